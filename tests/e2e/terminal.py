"""A terminal for tests: a pty with a screen that answers as a real one does."""

from __future__ import annotations

import os
import re
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pexpect
import pyte

COLUMNS = 60
ROWS = 16
TIMEOUT_S = 20.0
_SPEED = re.compile(r"( · (context )?[\d,]+/[\d,]+)?( · [\d.]+ tokens/s)?$")


class _Screen(pyte.Screen):
    """Reports the cursor's position to the program, which prompt_toolkit asks for."""

    def __init__(self, child: pexpect.spawn[bytes]) -> None:
        super().__init__(COLUMNS, ROWS)
        self._child = child

    def write_process_input(self, data: str) -> None:
        self._child.send(data)


class Terminal:
    """Runs a Python program in a pty; `wait_for` reads until the screen shows what it should."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        # where tests are shared by processes, these say how wide another terminal is
        inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.child: pexpect.spawn[bytes] = pexpect.spawn(
            sys.executable,
            list(argv),
            dimensions=(ROWS, COLUMNS),
            env={**inherited, "TERM": "xterm-256color", "NO_COLOR": "", **env},
            timeout=TIMEOUT_S,
        )
        self.screen = _Screen(self.child)
        self.raw = b""
        self._stream = pyte.ByteStream(self.screen)
        # the pty's own settings, before the program changes them
        self._settings = self._current_settings()

    def close(self) -> None:
        self.child.close(force=True)

    def clear(self) -> None:
        """Forget what is on the screen; the program does not know."""
        self.screen.erase_in_display(2)

    @property
    def lines(self) -> list[str]:
        """The lines of `text` without context and speed, which no two runs share."""
        return [_SPEED.sub("", line) for line in self.text.split("\n")]

    @property
    def text(self) -> str:
        """The screen without blank lines at its end."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip("\n")

    def type(self, text: str) -> None:
        self.child.send(text.encode())

    def wait_for(self, *wanted: str) -> None:
        """Read until all of `wanted` is on the screen."""
        self._read_until(lambda: all(text in self.text for text in wanted), wanted)

    def wait_for_screen(self, *expected: str) -> None:
        """Read until the whole screen is `expected`, one line each."""
        self._read_until(lambda: self.lines == list(expected), expected)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Read until something beside the screen has come about."""
        self._read_until(condition, (what,))

    def wait_for_end(self) -> int:
        """Read until the program ends; its exit code, or minus the signal that killed it."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline and self._read():
            pass
        self.child.wait()
        return -(self.child.signalstatus or 0) or self.child.exitstatus or 0

    def has_restored_settings(self) -> bool:
        """Whether echo, line mode and the rest are as they were before the program."""
        return self._current_settings() == self._settings

    def _read_until(self, condition: Callable[[], bool], wanted: Sequence[str]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline:
                seen = "\n".join(self.lines)
                raise AssertionError("wanted:\n" + "\n".join(wanted) + f"\nseen:\n{seen}")
            self._read()

    def _current_settings(self) -> list[Any]:
        return termios.tcgetattr(self.child.child_fd)

    def _read(self) -> bool:
        try:
            data = self.child.read_nonblocking(65536, timeout=0.1)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self._stream.feed(data)
        return True
