"""A stream is passed on byte for byte, in whole frames."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from chatserve.protocol.sse import PING, encode_event
from chatserve.server.units import MAX_HELD_BYTES, FrameReader

STREAM = b"".join([encode_event("你好 🙂"), PING, encode_event("a\nb"), encode_event("[DONE]")])


def passed(chunks: Iterable[bytes]) -> list[bytes]:
    reader = FrameReader()
    return [frames for chunk in chunks if (frames := reader.feed(chunk))]


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


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [MAX_HELD_BYTES // 2, MAX_HELD_BYTES // 8 + 1, 65_521])
def test_a_very_long_frame_is_passed_on_as_it_comes(newline: bytes, size: int) -> None:
    long = b"data: " + b"x" * (3 * MAX_HELD_BYTES) + newline * 2
    stream = PING + long + PING
    pieces = passed(stream[i : i + size] for i in range(0, len(stream), size))
    assert b"".join(pieces).startswith(PING + long)
    assert max(map(len, pieces)) <= MAX_HELD_BYTES + size


def test_an_end_that_is_cut_behind_what_was_passed_on() -> None:
    long = b"x" * (MAX_HELD_BYTES + 1)
    for newline in (b"\n", b"\r\n"):
        end = newline * 2
        for cut in range(1, len(end)):
            pieces = passed([long + end[:cut], end[cut:] + b"data: half"])
            assert b"".join(pieces) == long + end
