"""No client, but what the guard must catch: a call to another host, whose failure is ignored."""

from __future__ import annotations

import contextlib
import socket


def judge(_url: str) -> None:
    for address in (("192.0.2.1", 9), ("example.invalid", 9)):
        with contextlib.suppress(OSError):
            socket.create_connection(address, timeout=1).close()
