"""Queues, budget and reservations, without a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatserve.engine.kv_cache import KVCache
from chatserve.engine.scheduler import Scheduler
from chatserve.engine.sequence import SamplingParams, Sequence, Status
from chatserve.errors import ContextLengthExceeded


def build(num_tokens: int = 1000, seqs: int = 4, budget: int = 16) -> Scheduler:
    return Scheduler(
        KVCache(num_tokens),
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
    )


def sequence(name: str, num_prompt: int = 5, max_tokens: int = 3) -> Sequence:
    return Sequence(name, tuple(range(num_prompt)), SamplingParams(max_tokens=max_tokens), 0)


def run(scheduler: Scheduler) -> dict[str, int]:
    """One step with a fake model: every sampled sequence gets token 7."""
    batch = scheduler.schedule()
    for item in batch:
        is_sampled = item.is_sampled
        item.sequence.num_computed += item.num_tokens
        if is_sampled:
            item.sequence.token_ids.append(7)
    return {item.sequence.seq_id: item.num_tokens for item in batch}


def test_decode_goes_first_and_prefill_takes_what_is_left() -> None:
    scheduler = build(budget=8)
    scheduler.add(sequence("a", 4))
    assert run(scheduler) == {"a": 4}
    scheduler.add(sequence("b", 20))
    assert run(scheduler) == {"a": 1, "b": 7}
    assert run(scheduler) == {"a": 1, "b": 7}
    assert run(scheduler) == {"a": 1, "b": 6}
    assert run(scheduler) == {"a": 1, "b": 1}


def test_a_sequence_waits_until_its_worst_case_fits() -> None:
    scheduler = build(num_tokens=20)
    first, second = sequence("a", 10, 6), sequence("b", 3, 2)
    scheduler.add(first)
    scheduler.add(second)
    assert run(scheduler) == {"a": 10}
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    scheduler.remove(first)
    assert run(scheduler) == {"b": 3}


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = build(seqs=2)
    for name in "abc":
        scheduler.add(sequence(name))
    assert set(run(scheduler)) == {"a", "b"}


def test_a_sequence_that_can_never_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(ContextLengthExceeded, match=r"need 1,100 .* holds 1,000"):
        build().check(600, SamplingParams(max_tokens=500))


def test_a_waiting_sequence_can_be_removed() -> None:
    scheduler = build()
    item = sequence("a")
    scheduler.add(item)
    scheduler.remove(item)
    assert (item.status, scheduler.has_work) == (Status.FINISHED, False)


@given(st.lists(st.tuples(st.sampled_from("arx"), st.integers(1, 40), st.integers(1, 20)),
                max_size=60))  # fmt: skip
def test_reservations_add_up_after_any_sequence_of_operations(
    operations: list[tuple[str, int, int]],
) -> None:
    cache = KVCache(100)
    scheduler = Scheduler(cache, max_num_seqs=3, max_num_batched_tokens=8)
    live: list[Sequence] = []
    for index, (operation, number, max_tokens) in enumerate(operations):
        if operation == "a":
            item = sequence(str(index), number, max_tokens)
            if item.num_prompt_tokens + max_tokens <= cache.num_tokens:
                scheduler.add(item)
                live.append(item)
        elif operation == "r":
            run(scheduler)
        elif live:
            scheduler.remove(live.pop(number % len(live)))
        running = [item for item in live if item.status is Status.RUNNING]
        reserved = sum(item.num_prompt_tokens + item.params.max_tokens for item in running)
        assert cache.num_free_tokens + reserved == cache.num_tokens
        assert scheduler.num_running == len(running) <= 3
        assert scheduler.num_running + scheduler.num_waiting == len(live)
    for item in live:
        scheduler.remove(item)
    assert cache.num_free_tokens == cache.num_tokens
