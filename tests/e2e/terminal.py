"""A terminal for tests: a pty with a screen that answers as a real one does."""

from __future__ import annotations

import os
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import pexpect
import pyte

COLUMNS = 60
ROWS = 16
TIMEOUT_S = 20.0


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
        self.child: pexpect.spawn[bytes] = pexpect.spawn(
            sys.executable,
            list(argv),
            dimensions=(ROWS, COLUMNS),
            env={**os.environ, "TERM": "xterm-256color", "NO_COLOR": "", **env},
            timeout=TIMEOUT_S,
        )
        self.screen = _Screen(self.child)
        self.raw = b""
        self._stream = pyte.ByteStream(self.screen)
        # the pty's own settings, before the program changes them
        self._settings = self._current_settings()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.child.close(force=True)

    @property
    def lines(self) -> list[str]:
        """The screen without blank lines at its end."""
        text = "\n".join(line.rstrip() for line in self.screen.display)
        return text.rstrip("\n").split("\n")

    def type(self, text: str) -> None:
        self.child.send(text.encode())

    def wait_for(self, *wanted: str) -> None:
        """Read until all of `wanted` is on the screen."""
        deadline = time.monotonic() + TIMEOUT_S
        while not all(text in "\n".join(self.lines) for text in wanted):
            if time.monotonic() > deadline:
                raise AssertionError(f"{wanted} never came:\n" + "\n".join(self.lines))
            self._read()

    def wait_for_screen(self, *expected: str) -> None:
        """Read until the whole screen is `expected`, one line each."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.lines != list(expected):
            if time.monotonic() > deadline:
                assert self.lines == list(expected)
            self._read()

    def wait_for_end(self) -> int:
        """Read until the program ends; its exit code, or minus the signal that killed it."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline and self._read():
            pass
        self.child.wait()
        return -self.child.signalstatus if self.child.signalstatus else self.child.exitstatus

    def has_restored_settings(self) -> bool:
        """Whether echo, line mode and the rest are as they were before the program."""
        return self._current_settings() == self._settings

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
