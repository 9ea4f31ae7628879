"""The two ends of the line between a supervisor and its child process.

The child notices the death of its supervisor, however it died, and leaves at once; the supervisor
hears the one line that says why the child ended, and whether a new one would end alike.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass

PR_SET_PDEATHSIG = 1
MAX_LINE_CHARS = 4000
MAX_WORDS_BYTES = 64 * 1024  # a character takes at most 12 bytes in JSON


@dataclass(frozen=True)
class LastWords:
    """Why a child ended. `is_final`: it says so itself, and another start would end alike."""

    message: str
    is_final: bool


class Lifeline:
    """The supervisor's end. `child_fd` is inherited by the child and then closed here."""

    def __init__(self) -> None:
        self._parent, self._child = socket.socketpair()
        self._parent.setblocking(False)

    @property
    def child_fd(self) -> int:
        return self._child.fileno()

    def close_child_end(self) -> None:
        """Call it after the child has started, or its end would never close."""
        self._child.close()

    def last_words(self) -> LastWords | None:
        """What the child said before it ended, if anything."""
        try:
            data = self._parent.recv(MAX_WORDS_BYTES)
            return LastWords(**json.loads(data)) if data else None
        except (BlockingIOError, ConnectionResetError, ValueError, TypeError):
            return None

    def close(self) -> None:
        self._parent.close()
        self._child.close()


def tie_to_parent(fd: int, *, by_kernel: bool = False) -> None:
    """In the child: end this process as soon as the other end of `fd` is closed.

    `by_kernel`: on Linux the kernel also does it, should this process hang; only for a parent whose
    thread that started this process lives as long as it does itself.
    """
    if by_kernel and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    thread = threading.Thread(target=_leave_at_end_of, args=(fd,), name="lifeline", daemon=True)
    thread.start()


def report_to_parent(fd: int, message: str, is_final: bool) -> None:
    """In the child: leave the last words for the supervisor."""
    line = " ".join(message.splitlines())[:MAX_LINE_CHARS]
    try:
        os.write(fd, json.dumps({"message": line, "is_final": is_final}).encode())
    except OSError:
        # nobody is left to tell
        return


def _leave_at_end_of(fd: int) -> None:
    while True:
        try:
            if not os.read(fd, 1):
                break
        except OSError:
            break
    # no clean-up: nobody waits for it, and it could hang
    os._exit(1)
