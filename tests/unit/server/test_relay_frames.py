"""A stream is passed on byte for byte, in whole frames."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable

import pytest

from chatserve.errors import BadStream
from chatserve.protocol.sse import MAX_EVENT_BYTES, PING, encode_event
from chatserve.server.relay import whole_frames

STREAM = b"".join([encode_event("你好 🙂"), PING, encode_event("a\nb"), encode_event("[DONE]")])


async def source(chunks: Iterable[bytes]) -> AsyncGenerator[bytes]:
    for chunk in chunks:
        yield chunk


def passed(chunks: Iterable[bytes]) -> list[bytes]:
    async def main() -> list[bytes]:
        return [frames async for frames in whole_frames(source(chunks))]

    return asyncio.run(main())


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_same_bytes_at_every_cut(newline: bytes) -> None:
    stream = STREAM.replace(b"\n", newline)
    for cut in range(len(stream)):
        pieces = passed([stream[:cut], stream[cut:]])
        assert b"".join(pieces) == stream
        assert all(piece.endswith(newline * 2) for piece in pieces)
    assert b"".join(passed(stream[i : i + 1] for i in range(len(stream)))) == stream


def test_whole_chunks_are_not_held_back() -> None:
    assert passed([STREAM, PING]) == [STREAM, PING]


def test_frame_that_is_never_finished_is_dropped() -> None:
    assert passed([STREAM + b'data: {"half', b'er"}\n']) == [STREAM]


def test_endless_frame() -> None:
    chunk = b"x" * (1 << 20)
    with pytest.raises(BadStream):
        passed([chunk] * (MAX_EVENT_BYTES // len(chunk) + 1))
