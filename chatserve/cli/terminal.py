"""The terminal while an answer runs: keys wait unseen, the first Ctrl-C stops the answer.

Knows file descriptors, sizes and signals; no text, no server. Undoes every change on the way out.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn, TextIO

if sys.platform != "win32":
    import termios

_DEFAULT_COLUMNS = 80
_BRACKETS_ON, _BRACKETS_OFF = "\x1b[?2004h", "\x1b[?2004l"


def columns_of(stream: TextIO | None) -> int | None:
    """The width of the terminal behind `stream`; None when there is none."""
    if stream is None or not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or _DEFAULT_COLUMNS
    except OSError:
        return _DEFAULT_COLUMNS


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C raises `KeyboardInterrupt` once; further ones wait until what it stopped is tidy."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def keys_unseen(keyboard: TextIO, screen: TextIO) -> Iterator[None]:
    """Keep keys that are typed during an answer off the screen; they wait for the next prompt.

    A paste keeps its brackets, so that it is one question there.

    Does nothing when `keyboard` is no terminal.
    """
    if sys.platform == "win32" or not keyboard.isatty():
        yield
        return
    before = termios.tcgetattr(keyboard)
    quiet = termios.tcgetattr(keyboard)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    quiet[3] |= termios.NOFLSH  # or Ctrl-C would throw them away
    termios.tcsetattr(keyboard, termios.TCSANOW, quiet)
    try:
        _write(screen, _BRACKETS_ON)
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)
        with contextlib.suppress(OSError):  # a terminal that is gone
            _write(screen, _BRACKETS_OFF)


def _write(screen: TextIO, text: str) -> None:
    if screen.isatty():
        screen.write(text)
        screen.flush()


@contextlib.contextmanager
def exits_on_signals() -> Iterator[None]:
    """SIGTERM and a closed terminal end the process through every `finally` on the way."""

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        for also in numbers:
            signal.signal(also, signal.SIG_IGN)
        raise SystemExit(128 + number)

    numbers = [signal.SIGTERM] + ([signal.SIGHUP] if sys.platform != "win32" else [])
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
