"""Messages between a process and its helper: JSON in UTF-8 behind its length in four bytes."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

MAX_BYTES = (1 << 32) - 1
_LENGTH = struct.Struct(">I")


def send(connection: socket.socket, message: Any) -> None:
    """Raises `OSError` when the other side has gone or does not read in time."""
    # halves of surrogate pairs arrive as they are
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(
    connection: socket.socket, *, seconds: float | None = None, max_bytes: int = MAX_BYTES
) -> Any:
    """None at the end. Raises `TimeoutError`, and `OSError` when the other side has gone or sends
    what it may not."""
    deadline = None if seconds is None else time.monotonic() + seconds
    head = _receive_all(connection, _LENGTH.size, deadline)
    if head is None:
        return None
    size = _LENGTH.unpack(head)[0]
    if size > max_bytes:
        raise ConnectionError(f"it sends {size:,} bytes, over {max_bytes:,}")
    data = _receive_all(connection, size, deadline)
    if data is None:
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConnectionError("it sends what is no JSON") from error


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
