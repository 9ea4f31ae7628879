"""A client gets the frames whose block is there, and exactly those blocks are kept."""

from __future__ import annotations

import pytest

from chatserve.protocol.sse import PING, encode_event
from chatserve.server.stream_memory import MemoryBudget, StreamMemory
from chatserve.server.units import MAX_HELD_BYTES, UnitReader

START = b':s {"id":"x","fingerprint":"fp"}\n\n'
END = b":e\n\n"
# what the client gets, and the block behind it
UNITS = [
    (encode_event("role 0") + encode_event("role 1"), START),
    (encode_event("你好 🙂"), b":t 0 5\n\n"),
    (b"", b":t 0\n\n"),
    (encode_event("a\nb"), b":t 1 7 8 9\n\n"),
    (PING, b""),
    (encode_event('{"type":"ping"}', "ping"), b":p\n\n"),
    (encode_event("c"), b":t 0 6\n\n"),
    (encode_event("text") + encode_event("why"), b':f 0 1 2 {"logprobs":[]}\n\n'),
    (b"", b":f 1\n\n"),
    (encode_event("usage") + encode_event("[DONE]"), END),
]
STREAM = b"".join(frames + block for frames, block in UNITS)
FRAMES = b"".join(frames for frames, _ in UNITS)
JOURNAL = b"".join(block for _, block in UNITS if block[1:2] in (b"s", b"t", b"f"))


def memory() -> StreamMemory:
    return StreamMemory(MemoryBudget(), b"{}")


def units_within(num_bytes: int) -> tuple[bytes, bytes]:
    """What a client has, and what is kept, of the first `num_bytes` of the stream."""
    frames = journal = b""
    for frame, block in UNITS:
        num_bytes -= len(frame) + len(block)
        if num_bytes < 0:
            break
        frames += frame
        journal += block if block[1:2] in (b"s", b"t", b"f") else b""
    return frames, journal


def test_what_the_client_has_is_what_is_kept_at_every_cut() -> None:
    for cut in range(1, len(STREAM)):
        kept = memory()
        reader = UnitReader(kept)
        passed = reader.feed(STREAM[:cut])
        assert (passed, kept.journal) == units_within(cut)
        assert not reader.is_whole
        assert passed + reader.feed(STREAM[cut:]) == FRAMES
        assert kept.journal == JOURNAL and reader.is_whole


def test_byte_by_byte() -> None:
    kept = memory()
    reader = UnitReader(kept)
    passed = b""
    for i in range(len(STREAM)):
        passed += reader.feed(STREAM[i : i + 1])
        assert (passed, kept.journal) == units_within(i + 1)
    assert reader.is_whole and reader.failure is None


def test_one_unit_a_read() -> None:
    kept = memory()
    reader = UnitReader(kept)
    assert [reader.feed(frames + block) for frames, block in UNITS] == [f for f, _ in UNITS]
    assert kept.journal == JOURNAL and reader.is_whole


def test_a_worker_that_cannot_go_on() -> None:
    kept = memory()
    reader = UnitReader(kept)
    stream = encode_event("role") + START + encode_event("half") + b':x {"error":{}}\n\n'
    assert reader.feed(stream) == encode_event("role") + encode_event("half")
    assert reader.failure == b'{"error":{}}' and not reader.is_whole
    assert kept.journal == START


def test_what_a_long_frame_costs_is_that_it_cannot_go_on() -> None:
    long = encode_event(b"x" * (3 * MAX_HELD_BYTES))
    rest = b":t 0 1\n\n" + encode_event("y") + b":t 0 2\n\n" + PING + encode_event("z") + END
    stream = encode_event("role") + START + long + rest
    for size in (65_521, MAX_HELD_BYTES // 2):
        kept = memory()
        reader = UnitReader(kept)
        pieces = [reader.feed(stream[i : i + size]) for i in range(0, len(stream), size)]
        expected = encode_event("role") + long + encode_event("y") + PING + encode_event("z")
        assert b"".join(pieces) == expected
        assert max(map(len, pieces)) <= MAX_HELD_BYTES + size
        assert reader.is_whole and not reader.is_inside and not kept.is_kept


def test_inside_of_a_long_frame() -> None:
    reader = UnitReader(memory())
    assert reader.feed(encode_event("a") + START) and not reader.is_inside
    assert reader.feed(b"data: " + b"x" * (2 * MAX_HELD_BYTES)) and reader.is_inside
    assert reader.feed(b":t 0 5\n\n") and not reader.is_inside


def test_what_is_not_kept_is_not_held_back() -> None:
    kept = memory()
    reader = UnitReader(kept)
    reader.feed(encode_event("role") + START)
    kept.forget()
    assert reader.feed(encode_event("a")) == encode_event("a")
    assert reader.feed(b":t 0 5\n\n" + encode_event("b")) == encode_event("b")
    assert not kept.journal.endswith(b":t 0 5\n\n")


@pytest.mark.parametrize("mark", [b"\n\n:", b"\n\n:t", b"\n\n:t ", b"\n\n:t 0 5\n"])
def test_a_block_that_is_cut(mark: bytes) -> None:
    kept = memory()
    reader = UnitReader(kept)
    reader.feed(encode_event("role") + START)
    assert reader.feed(b"data: a" + mark) == b""
    whole = b"data: a\n\n:t 0 5\n\n"
    assert reader.feed(whole.removeprefix(b"data: a" + mark)) == b"data: a\n\n"
    assert kept.journal == START + b":t 0 5\n\n"
