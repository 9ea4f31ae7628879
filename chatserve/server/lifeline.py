"""The two ends of the line between a supervisor and its child process.

The child notices the death of its supervisor, however it died, and leaves at once; the supervisor
hears the one line that says why the child ended.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading

PR_SET_PDEATHSIG = 1
MAX_LINE_BYTES = 4096


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

    def last_line(self) -> str | None:
        """What the child said before it ended, if anything."""
        try:
            data = self._parent.recv(MAX_LINE_BYTES)
        except (BlockingIOError, ConnectionResetError):
            return None
        lines = data.decode("utf-8", "replace").splitlines()
        return lines[-1] if lines else None

    def close(self) -> None:
        self._parent.close()
        self._child.close()


def tie_to_parent(fd: int) -> None:
    """In the child: end this process as soon as the supervisor's end of `fd` is closed.

    On Linux the kernel also does it, should this process hang.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_leave_at_end_of, args=(fd,), name="lifeline", daemon=True).start()


def report_to_parent(fd: int, line: str) -> None:
    """In the child: leave a last line for the supervisor."""
    data = " ".join(line.splitlines()).encode("utf-8", "replace")[: MAX_LINE_BYTES - 1] + b"\n"
    try:
        os.write(fd, data)
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
