"""What is kept of streams is bounded, of each and of all."""

from __future__ import annotations

from chatserve.server.stream_memory import MemoryBudget, StreamMemory

BLOCK = b":t 0 12345\n\n"


def test_what_is_kept() -> None:
    budget = MemoryBudget()
    memory = StreamMemory(budget, b"body")
    assert memory.is_kept and not memory.start
    memory.begin(b":s 1\n\n")
    memory.begin(b":s 2\n\n")
    memory.keep(BLOCK)
    assert memory.journal == b":s 1\n\n" + BLOCK
    assert budget.num_bytes >= len(b"body") + len(BLOCK)
    memory.forget()
    assert not memory.is_kept and budget.num_bytes == 0
    memory.keep(BLOCK)
    memory.forget()
    assert budget.num_bytes == 0 and memory.num_bytes == 0


def test_a_stream_has_its_limit() -> None:
    budget = MemoryBudget()
    memory = StreamMemory(budget, b"x" * 1000, max_bytes=100_000)
    num_kept = 0
    while memory.is_kept:
        memory.keep(BLOCK)
        num_kept += len(BLOCK)
        assert budget.num_bytes <= 100_000
        assert num_kept < 200_000
    assert num_kept > 40_000 and budget.num_bytes == 0
    assert not StreamMemory(budget, b"x" * 100_000, max_bytes=100_000).is_kept


def test_all_streams_share_a_limit() -> None:
    budget = MemoryBudget(max_bytes=50_000)
    memories = [StreamMemory(budget, b"x" * 9_000) for _ in range(6)]
    assert [memory.is_kept for memory in memories] == [True, True, True, False, False, False]
    assert budget.num_bytes <= 50_000
    memories[0].forget()
    assert StreamMemory(budget, b"x" * 9_000).is_kept


def test_tokens_since() -> None:
    memory = StreamMemory(MemoryBudget(), b"")
    memory.keep(b":t 0 5\n\n")
    place = memory.num_bytes
    memory.keep(b":t 10\n\n")
    memory.keep(b':f 0 {"a":1}\n\n')
    assert memory.has_tokens_since(0) and not memory.has_tokens_since(place)
    memory.keep(b":t 10 7\n\n")
    assert memory.has_tokens_since(place)
