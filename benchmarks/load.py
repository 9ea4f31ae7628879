"""A load client for OpenAI-compatible servers: many streams at once, at little CPU of its own.

While streams run it only notes when bytes came; everything is read out of them afterwards.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

TIMEOUT_S = 600.0
_BLANK_LINE = re.compile(rb"\r?\n\r?\n")


class RequestFailed(Exception):
    """The server answered with something else than a whole stream."""


@dataclass(frozen=True)
class Answer:
    """One streamed answer: when it was asked for, when its pieces of text came, what it cost."""

    asked: float
    times: tuple[float, ...]
    num_prompt_tokens: int
    num_tokens: int


def run(port: int, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Send all `bodies` at the same moment; waits for the end of every stream."""
    return asyncio.run(_run(port, path, bodies))


async def _run(port: int, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
    loop = asyncio.get_running_loop()
    connections = [
        (await loop.create_connection(_Connection, "127.0.0.1", port))[1] for _ in bodies
    ]
    for connection, body in zip(connections, bodies, strict=True):
        connection.ask(path, body)
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.gather(*(connection.ended for connection in connections))
    return [read_answer(item.asked, item.pieces) for item in connections]


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.asked = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self, path: str, body: Mapping[str, Any]) -> None:
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        )
        self.asked = time.perf_counter()
        self._transport.write(head.encode() + data)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def read_answer(asked: float, pieces: Sequence[tuple[float, bytes]]) -> Answer:
    """Raises `RequestFailed` with what the server said."""
    raw = b"".join(data for _, data in pieces)
    head, _, _ = raw.partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise RequestFailed(raw[:500].decode(errors="replace") or "the server said nothing")
    ends = list(accumulate(len(data) for _, data in pieces))
    times: list[float] = []
    usage: Mapping[str, int] = {}
    for end, event in _events(raw, len(head) + 4, is_chunked=b"chunked" in head.lower()):
        if event == b"[DONE]":
            continue
        chunk = json.loads(event)
        if "error" in chunk or chunk.get("object") == "error":
            raise RequestFailed(event.decode(errors="replace"))
        usage = chunk.get("usage") or usage
        if any(_text(choice) for choice in chunk.get("choices", ())):
            times.append(pieces[bisect_left(ends, end)][0])
    return Answer(
        asked, tuple(times), usage.get("prompt_tokens", 0),
        usage.get("completion_tokens", len(times)),
    )  # fmt: skip


def _text(choice: Mapping[str, Any]) -> str:
    delta = choice.get("delta") or {}
    return choice.get("text") or delta.get("content") or ""


def _events(raw: bytes, start: int, *, is_chunked: bool) -> list[tuple[int, bytes]]:
    """The data of each event and where in `raw` it ends."""
    body, ends, origins = bytearray(), [0], [start]
    if is_chunked:
        while (line_end := raw.find(b"\r\n", start)) >= 0:
            size = int(raw[start:line_end].partition(b";")[0], 16)
            body += raw[line_end + 2 : line_end + 2 + size]
            ends.append(len(body))
            origins.append(line_end + 2 + size)
            start = line_end + 4 + size
            if size == 0:
                break
    else:
        body += raw[start:]
        ends.append(len(body))
        origins.append(len(raw))
    events: list[tuple[int, bytes]] = []
    position = 0
    for blank in _BLANK_LINE.finditer(body):
        event = body[position : blank.start()]
        position = blank.end()
        if event.startswith(b"data:"):
            events.append((origins[bisect_left(ends, position)], bytes(event[5:].strip())))
    return events


def first_token_ms(answers: Sequence[Answer]) -> list[float]:
    """Of the answers that have text, ascending. Raises `RequestFailed` when none has."""
    times = sorted(1000 * (answer.times[0] - answer.asked) for answer in answers if answer.times)
    if not times:
        raise RequestFailed("no answer has any text")
    return times


def streams_figures(answers: Sequence[Answer]) -> dict[str, float]:
    """Speed of all streams together, from the request and while all of them run; first token.

    Raises `RequestFailed` when no stream brought any text.
    """
    first = first_token_ms(answers)
    answers = [answer for answer in answers if answer.times]
    start = min(answer.asked for answer in answers)
    end = max(answer.times[-1] for answer in answers)
    total = sum(answer.num_tokens for answer in answers)
    figures = {
        "tokens_per_s": total / (end - start),
        "first_token_median_ms": first[len(first) // 2],
    }
    opened = max(answer.times[0] for answer in answers)
    closed = min(answer.times[-1] for answer in answers)
    if closed > opened:
        inside = sum(_tokens_between(answer, opened, closed) for answer in answers)
        figures["together_tokens_per_s"] = inside / (closed - opened)
    return figures


def _tokens_between(answer: Answer, start: float, end: float) -> float:
    """Tokens of the pieces that came in between; a piece may hold several tokens."""
    inside = sum(start < moment <= end for moment in answer.times)
    return inside * answer.num_tokens / len(answer.times)
