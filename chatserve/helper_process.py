"""A process of ours that does what must not be done in ours: `python -m MODULE`, asked in frames.

Its standard input is a socket; it ends when the other end of that is closed, so with its parent.
Knows nothing of what is asked.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

from chatserve import environment, frames

_LAST_WORDS_S = 5.0
"""How long a process that has closed its socket may take to be gone."""


class HelperProcess:
    """Runs from here until `end`. Asked by one thread at a time. Raises `OSError` where it cannot
    be started."""

    def __init__(self, module: str) -> None:
        self._connection, theirs = socket.socketpair()
        self._lock = threading.Lock()
        try:
            self._popen = subprocess.Popen(
                # -P: no file of the folder that we are in is ever imported
                [sys.executable, "-P", "-m", module],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what a request holds belongs in no log
                env=environment.without_secrets(),
                start_new_session=True,  # Ctrl-C is ours to hear
            )
        except BaseException:
            self._connection.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def send(self, message: Any, *, seconds: float) -> None:
        """Raises `OSError` when it has gone or does not read in time."""
        self._connection.settimeout(seconds)
        frames.send(self._connection, message)

    def receive(self, *, seconds: float, max_bytes: int = frames.MAX_BYTES) -> Any:
        """None when it has gone. Raises as `frames.receive` does."""
        return frames.receive(self._connection, seconds=seconds, max_bytes=max_bytes)

    def kill(self) -> None:
        """With its own children. From any thread; whoever waits for its answer notices."""
        with self._lock:
            # afterwards its number may be another's
            if self._popen.returncode is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._popen.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill it, and wait until it is gone."""
        self._connection.close()
        self.kill()
        with self._lock:
            self._popen.wait()

    def fate(self) -> int:
        """How a process that answers no more has ended, as `Popen.returncode` says it; one that
        has not is killed."""
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired), self._lock:
            self._popen.wait(_LAST_WORDS_S)
        self.end()
        return self._popen.returncode
