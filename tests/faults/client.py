"""LoadClient: sends requests and keeps what happened to each, byte for byte with times.

While requests run it only notes bytes; `history` reads them. One request a connection: where the
connection ends, the answer does.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TIMEOUT_S = 120.0
PAUSE_S = 0.05
End = Literal["closed", "reset", "cancelled", "timeout", "not connected"]
CHAT = "/v1/chat/completions"
_FRAME = b"data: "


@dataclass(frozen=True)
class Request:
    """What is asked for. `body` is sent as it is when it is bytes.

    `cancel_after`: the client leaves with an RST after so many frames; 0: as soon as it has asked.
    `text`, `num_tokens`: of a whole answer; None where the test does not know. `is_bad`: it has to
    be refused.
    """

    body: Mapping[str, Any] | bytes
    path: str = CHAT
    text: str | None = None
    num_tokens: int | None = None
    cancel_after: int | None = None
    is_bad: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        data = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        lines = {
            "Host": "127.0.0.1", "Content-Type": "application/json",
            "Content-Length": str(len(data)), "Connection": "close", **self.headers,
        }  # fmt: skip
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"POST {self.path} HTTP/1.1\r\n{head}\r\n".encode() + data


@dataclass
class Record:
    """One request's history. `port` is the client's own, by which a proxy knows it."""

    number: int
    request: Request
    asked_at: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    end: End | None = None
    ended_at: float = 0.0
    port: int = 0

    @property
    def raw(self) -> bytes:
        return b"".join(data for _, data in self.pieces)


class LoadClient:
    """Every request that it sends gets a record, in the order in which they began."""

    def __init__(self, port: int, *, timeout_s: float = TIMEOUT_S) -> None:
        self.records: list[Record] = []
        self._port = port
        self._timeout_s = timeout_s
        self._numbers = itertools.count()

    async def send(self, request: Request) -> Record:
        """Send one request and wait for the end of its connection."""
        loop = asyncio.get_running_loop()
        record = Record(next(self._numbers), request, time.perf_counter())
        self.records.append(record)
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(record), "127.0.0.1", self._port
            )
        except OSError:
            _finish(record, "not connected")
            return record
        except asyncio.CancelledError:
            # its port is known a turn of the loop before this goes on
            _finish(record, "cancelled")
            raise
        try:
            async with asyncio.timeout(self._timeout_s):
                await connection.ended
        except TimeoutError:
            _finish(record, "timeout")
            connection.leave()
        except asyncio.CancelledError:
            _finish(record, "cancelled")
            connection.leave()
            raise
        return record

    async def send_all(self, requests: Iterable[Request], *, at_once: int) -> list[Record]:
        """Send them in their order, so many at a time."""
        waiting = iter(requests)
        records: list[Record] = []

        async def work() -> None:
            for request in waiting:
                records.append(await self.send(request))

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
        return records

    async def keep_busy(
        self, draw: Callable[[], Request], *, at_once: int, stop: asyncio.Event
    ) -> None:
        """Send what `draw` says, so many at a time, until `stop`; then wait for the last ones."""

        async def work() -> None:
            while not stop.is_set():
                record = await self.send(draw())
                if record.ended_at - record.asked_at < PAUSE_S:
                    # refused: whoever comes back at once drowns all else
                    await asyncio.sleep(PAUSE_S)

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())


def _finish(record: Record, end: End) -> None:
    if record.end is None:
        record.end, record.ended_at = end, time.perf_counter()


class _Connection(asyncio.Protocol):
    def __init__(self, record: Record) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._record = record
        self._num_frames = 0
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._record.port = transport.get_extra_info("sockname")[1]
        transport.write(self._record.request.to_bytes())
        if self._record.request.cancel_after == 0:
            # the request is on its way, and nobody waits for the answer
            asyncio.get_running_loop().call_soon(self._cancel)

    def data_received(self, data: bytes) -> None:
        record = self._record
        record.pieces.append((time.perf_counter(), data))
        if (most := record.request.cancel_after) is not None:
            seen = self._tail + data
            self._num_frames += seen.count(_FRAME)
            self._tail = seen[-len(_FRAME) + 1 :]
            if self._num_frames >= most:
                self._cancel()

    def connection_lost(self, error: Exception | None) -> None:
        _finish(self._record, "closed" if error is None else "reset")
        if not self.ended.done():
            self.ended.set_result(None)

    def leave(self) -> None:
        """As a client does that crashes: the other side gets an RST at once."""
        sock = self._transport.get_extra_info("socket")
        if not self._transport.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _cancel(self) -> None:
        _finish(self._record, "cancelled")
        self.leave()
