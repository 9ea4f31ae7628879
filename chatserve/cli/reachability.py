"""Whether somebody listens at an address: looked at by a thread, while others want to know.

Knows sockets and time; says nothing to whoever listens.
"""

from __future__ import annotations

import socket
import threading
import time
from urllib.parse import urlsplit

LOOK_EVERY_S = 2.0
CONNECT_TIMEOUT_S = 5.0
GONE, BACK = "server gone", "server is back"


class Reachability:
    """Asked by `news` again and again, for as long as it is of interest."""

    def __init__(self, url: str, *, every_s: float = LOOK_EVERY_S) -> None:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        self._address = (parts.hostname or "", port)
        self._every_s = every_s
        self._asked_at = 0.0
        # behind a proxy nobody is ever reached from here, which means nothing
        self._was_there = False
        self._news = ""
        self._lock = threading.Lock()
        self._is_looking = False

    def news(self) -> str:
        """`GONE`, or `BACK` until `forget`, or nothing; as it was a moment ago."""
        with self._lock:
            self._asked_at = time.monotonic()
            if not self._is_looking:
                self._is_looking = True
                threading.Thread(target=self._look, name="reach", daemon=True).start()
            return self._news

    def forget(self) -> None:
        """That it is back is known."""
        with self._lock:
            if self._news == BACK:
                self._news = ""

    def _look(self) -> None:
        """In a thread, until nobody has asked for a while."""
        while True:
            is_there = self._is_there()
            with self._lock:
                if is_there:
                    self._news = BACK if self._news == GONE else self._news
                elif self._was_there:
                    self._news = GONE
                self._was_there = self._was_there or is_there
            time.sleep(self._every_s)
            with self._lock:
                if time.monotonic() - self._asked_at > self._every_s:
                    self._is_looking = False
                    return

    def _is_there(self) -> bool:
        try:
            socket.create_connection(self._address, CONNECT_TIMEOUT_S).close()
        except (OSError, UnicodeError):
            return False
        return True
