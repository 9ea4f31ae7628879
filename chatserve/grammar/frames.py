"""Messages between a worker and its trial process: JSON behind its length in four bytes."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

_LENGTH = struct.Struct(">I")


def send(connection: socket.socket, message: Any) -> None:
    """Raises `OSError` when the other side has gone or does not read in time."""
    data = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket, *, seconds: float | None = None) -> Any:
    """None at the end. Raises `TimeoutError`, and `OSError` when the other side has gone."""
    deadline = None if seconds is None else time.monotonic() + seconds
    head = _receive_all(connection, _LENGTH.size, deadline)
    if head is None:
        return None
    data = _receive_all(connection, _LENGTH.unpack(head)[0], deadline)
    return None if data is None else json.loads(data)


def _receive_all(connection: socket.socket, size: int, deadline: float | None) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
        chunk = connection.recv(min(size - len(data), 1 << 20))
        if not chunk:
            return None
        data += chunk
    return bytes(data)
