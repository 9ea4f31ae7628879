"""Queues, budget, preemption and sharing, without a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatserve.engine.block_manager import BlockManager, BlockTable
from chatserve.engine.scheduler import Plan, Scheduler
from chatserve.engine.sequence import SamplingParams, Sequence, Status
from chatserve.engine.waiting_line import Priority
from chatserve.errors import ContextLengthExceeded

BLOCK_SIZE = 4


def build(num_blocks: int = 100, seqs: int = 4, budget: int = 16) -> tuple[Scheduler, BlockManager]:
    blocks = BlockManager(num_blocks, BLOCK_SIZE)
    scheduler = Scheduler(blocks, max_num_seqs=seqs, max_num_batched_tokens=budget)
    return scheduler, blocks


def sequence(
    name: str,
    num_prompt: int = 5,
    max_tokens: int = 3,
    *,
    group: str | None = None,
    salt: str = "",
    share: bytes = b"",
    priority: Priority = "interactive",
) -> Sequence:
    """Prompts of different names differ from their first token on, unless they share a group."""
    first = ord((group or name)[0]) * 1000
    prompt = tuple(range(first, first + num_prompt))
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(
        name, prompt, params, 0, group=group, table=BlockTable(salt.encode()), share=share,
        priority=priority,
    )  # fmt: skip


def advance(scheduler: Scheduler, plan: Plan) -> dict[str, int]:
    """Compute the plan with a fake model: every sampled sequence gets token 7."""
    for item in plan.items:
        scheduler.complete(item)
        if item.is_sampled:
            item.sequence.token_ids.append(7)
    return {item.sequence.seq_id: item.num_tokens for item in plan.items}


def run(scheduler: Scheduler) -> dict[str, int]:
    return advance(scheduler, scheduler.schedule())


def test_decode_goes_first_and_prefill_takes_what_is_left() -> None:
    scheduler, _ = build(budget=8)
    scheduler.add(sequence("a", 4))
    assert run(scheduler) == {"a": 4}
    scheduler.add(sequence("b", 20))
    assert run(scheduler) == {"a": 1, "b": 7}
    assert run(scheduler) == {"a": 1, "b": 7}
    assert run(scheduler) == {"a": 1, "b": 6}
    assert run(scheduler) == {"a": 1, "b": 1}


def test_what_a_prompt_leaves_of_the_budget_goes_to_the_next() -> None:
    scheduler, _ = build(budget=8)
    for name in "abc":
        scheduler.add(sequence(name, 5))
    assert run(scheduler) == {"a": 5, "b": 3}
    assert run(scheduler) == {"a": 1, "b": 2, "c": 5}


def test_a_sequence_waits_until_its_prompt_and_a_block_to_spare_fit() -> None:
    scheduler, _ = build(num_blocks=5)
    first = sequence("a", 9, 6)
    scheduler.add(first)
    scheduler.add(sequence("b", 8, 2))
    assert run(scheduler) == {"a": 9}
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    scheduler.remove(first)
    assert run(scheduler) == {"b": 8}


def test_a_prompt_that_takes_every_block_runs_when_it_is_alone() -> None:
    scheduler, _ = build(num_blocks=4)
    scheduler.add(sequence("a", 15, 1))
    assert run(scheduler) == {"a": 15}


def test_some_blocks_stay_free_at_admission_for_those_that_run() -> None:
    scheduler, blocks = build(num_blocks=300, seqs=9, budget=10_000)
    for name in "abc":
        scheduler.add(sequence(name, 98 * BLOCK_SIZE))
    assert set(run(scheduler)) == {"a", "b", "c"}
    assert blocks.num_free_blocks == 6
    scheduler.add(sequence("d", 3 * BLOCK_SIZE))
    scheduler.add(sequence("e", 1))
    run(scheduler)  # each of the three takes a block for its next token
    assert (scheduler.num_running, blocks.num_free_blocks) == (3, 3)


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler, _ = build(seqs=2)
    for name in "abc":
        scheduler.add(sequence(name))
    assert set(run(scheduler)) == {"a", "b"}


def test_each_running_sequence_has_a_token_in_every_step_however_small_the_budget() -> None:
    scheduler, _ = build(seqs=4, budget=2)
    for name in "abc":
        scheduler.add(sequence(name, 1, 9))
    assert set(run(scheduler)) == {"a", "b"}
    assert set(run(scheduler)) == {"a", "b"}


def test_a_sequence_that_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler, _ = build()
    scheduler.check(300, SamplingParams(max_tokens=100))
    with pytest.raises(ContextLengthExceeded, match=r"need 401 .* holds 400"):
        scheduler.check(301, SamplingParams(max_tokens=100))


def test_a_waiting_sequence_can_be_removed() -> None:
    scheduler, _ = build()
    item = sequence("a")
    scheduler.add(item)
    scheduler.remove(item)
    assert (item.status, scheduler.has_work) == (Status.FINISHED, False)


def test_the_youngest_is_preempted_waits_in_front_and_computes_again() -> None:
    scheduler, blocks = build(num_blocks=5)
    old, young = sequence("a", 8, 9), sequence("b", 3, 9)
    for item in (old, young, sequence("c", 5, 9)):
        scheduler.add(item)
    assert run(scheduler) == {"a": 8, "b": 3}
    assert run(scheduler) == {"a": 1, "b": 1}
    assert run(scheduler) == {"a": 1, "b": 1}
    assert blocks.num_free_blocks == 0
    for _ in range(2):
        assert run(scheduler) == {"a": 1, "b": 1}
    assert run(scheduler) == {"a": 1}
    assert (young.status, young.num_computed) == (Status.PREEMPTED, 0)
    assert scheduler.num_waiting == 2 and scheduler._line.first().seq_id == "b"
    scheduler.remove(old)
    # its first block is still in the cache
    assert run(scheduler) == {"b": 4, "c": 5}
    assert young.num_cached_tokens == 0


def test_a_prompt_is_found_in_the_cache_but_for_its_last_token() -> None:
    scheduler, _ = build()
    for expected in ({"a": 11}, {"a": 3}):
        item = sequence("a", 11)
        scheduler.add(item)
        assert run(scheduler) == expected
        scheduler.remove(item)
    assert item.num_cached_tokens == 8


def test_a_prompt_that_is_cached_wholly_computes_its_last_token_in_a_copy() -> None:
    scheduler, blocks = build(num_blocks=4)
    first, second = sequence("a", 8), sequence("a", 8)
    scheduler.add(first)
    run(scheduler)
    scheduler.remove(first)
    scheduler.add(second)
    plan = scheduler.schedule()
    assert [(item.num_tokens, item.is_sampled) for item in plan.items] == [(1, True)]
    [(source, target)] = plan.copies
    assert second.table.block_ids[-1] == target != source
    assert second.num_cached_tokens == 7
    assert blocks.num_free_blocks == 2


def test_another_salt_shares_nothing() -> None:
    scheduler, _ = build()
    for salt in ("x", "y"):
        item = sequence("a", 11, salt=salt)
        scheduler.add(item)
        assert run(scheduler) == {"a": 11}
        scheduler.remove(item)


def test_followers_wait_for_the_prompt_and_share_its_blocks() -> None:
    scheduler, blocks = build(budget=6)
    leader, *followers = (sequence(f"a{index}", 10, group="a") for index in range(3))
    for item in (leader, *followers):
        scheduler.add(item)
    assert run(scheduler) == {"a0": 6}
    assert run(scheduler) == {"a0": 4}
    plan = scheduler.schedule()
    assert len(plan.copies) == 2
    assert advance(scheduler, plan) == {"a0": 1, "a1": 1, "a2": 1}
    tables = [item.table.block_ids for item in (leader, *followers)]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({table[2] for table in tables}) == 3
    assert blocks.num_free_blocks == 100 - 5
    assert [item.num_cached_tokens for item in followers] == [9, 9]


def test_a_follower_that_comes_late_does_not_see_what_the_leader_has_written_since() -> None:
    scheduler, _ = build(seqs=2)
    leader, other = sequence("a0", 6, 20, group="a"), sequence("b", 3)
    for item in (leader, other, sequence("a1", 6, 20, group="a")):
        scheduler.add(item)
    for _ in range(5):
        run(scheduler)
    scheduler.remove(other)
    plan = scheduler.schedule()
    assert advance(scheduler, plan) == {"a0": 1, "a1": 1}
    assert [source for source, _ in plan.copies] == [leader.table.block_ids[1]]


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_a_follower_takes_over_when_the_leader_leaves(num_steps: int) -> None:
    scheduler, blocks = build(budget=6)
    leader, follower, last = (sequence(f"a{index}", 10, 9, group="a") for index in range(3))
    for item in (leader, follower, last):
        scheduler.add(item)
    for _ in range(num_steps):
        run(scheduler)
    scheduler.remove(leader)
    for _ in range(4):
        run(scheduler)
    assert min(follower.num_generated_tokens, last.num_generated_tokens) >= 1
    assert follower.table.block_ids[:2] == last.table.block_ids[:2]
    for item in (follower, last):
        scheduler.remove(item)
    assert blocks.num_free_blocks == 100


def test_a_group_with_another_prompt_shares_nothing() -> None:
    scheduler, _ = build()
    first, second = sequence("a", 5, group="g"), sequence("b", 5)
    second.group = "g"
    scheduler.add(first)
    scheduler.add(second)
    assert run(scheduler) == {"a": 5, "b": 5}


OPERATIONS = st.tuples(
    st.sampled_from("aasssssr"), st.integers(1, 40), st.integers(1, 20), st.integers(1, 4)
)


@given(st.lists(OPERATIONS, max_size=80))
def test_blocks_add_up_after_any_sequence_of_operations(
    operations: list[tuple[str, int, int, int]],
) -> None:
    scheduler, blocks = build(num_blocks=20, seqs=3, budget=8)
    live: list[Sequence] = []
    for index, (operation, number, max_tokens, n) in enumerate(operations):
        if operation == "a":
            for choice in range(n):
                item = sequence(f"{index}-{choice}", number, max_tokens, group=str(index))
                scheduler.check(item.num_prompt_tokens, item.params)
                scheduler.add(item)
                live.append(item)
        elif operation == "s":
            plan = scheduler.schedule()
            assert bool(plan.items) == bool(live)
            assert sum(advance(scheduler, plan).values()) == plan.num_tokens <= 8
            for item in list(live):
                if item.num_generated_tokens == item.params.max_tokens:
                    scheduler.remove(item)
                    live.remove(item)
        elif live:
            scheduler.remove(live.pop(number % len(live)))
        running = [item for item in live if item.status is Status.RUNNING]
        held = {block_id for item in live for block_id in item.table.block_ids}
        assert blocks.num_free_blocks + len(held) == blocks.num_blocks
        assert scheduler.num_running == len(running) <= 3
        assert scheduler.num_running + scheduler.num_waiting == len(live)
        for item in live:
            assert len(item.table.block_ids) * BLOCK_SIZE >= item.num_computed
            assert item in running or not item.table.block_ids
    for item in live:
        scheduler.remove(item)
    assert blocks.num_free_blocks == blocks.num_blocks


def test_a_held_sequence_takes_no_place_in_the_batch_and_keeps_its_blocks() -> None:
    scheduler, blocks = build(seqs=1)
    slow, quick = sequence("a", 6, 9), sequence("b", 5, 9)
    for item in (slow, quick):
        scheduler.add(item)
    assert run(scheduler) == {"a": 6}
    scheduler.hold(slow)
    assert (scheduler.num_running, scheduler.num_held) == (0, 1)
    num_free = blocks.num_free_blocks
    assert run(scheduler) == {"b": 5}
    assert blocks.num_free_blocks == num_free - 2
    scheduler.remove(quick)
    assert not scheduler.has_work and run(scheduler) == {}
    scheduler.release(slow)
    # nothing is computed again
    assert run(scheduler) == {"a": 1}
    scheduler.remove(slow)
    assert blocks.num_free_blocks == 100 and scheduler.num_held == 0


def test_a_released_sequence_waits_in_front_where_the_batch_is_full() -> None:
    scheduler, _ = build(seqs=1)
    slow, quick = sequence("a", 6, 9), sequence("b", 5, 9)
    for item in (slow, quick, sequence("c", 5, 9)):
        scheduler.add(item)
    run(scheduler)
    scheduler.hold(slow)
    assert run(scheduler) == {"b": 5}
    scheduler.release(slow)
    assert run(scheduler) == {"b": 1}
    assert (slow.status, scheduler.num_waiting) == (Status.PREEMPTED, 2)
    scheduler.remove(quick)
    # a full block of it is still in the cache
    assert run(scheduler) == {"a": 3}


def test_blocks_of_held_sequences_are_taken_before_anyone_is_preempted() -> None:
    scheduler, blocks = build(num_blocks=4)
    slow, quick = sequence("a", 8, 8), sequence("b", 3, 13)
    scheduler.add(slow)
    run(scheduler)
    scheduler.hold(slow)
    scheduler.add(quick)
    for _ in range(8):
        run(scheduler)
    assert (slow.status, scheduler.num_preempted) == (Status.PREEMPTED, 0)
    assert quick.num_generated_tokens == 8
    scheduler.remove(quick)
    scheduler.release(slow)
    # its first block has not been needed
    assert run(scheduler) == {"a": 5}
    scheduler.remove(slow)
    assert blocks.num_free_blocks == 4


def test_a_prompt_that_needs_the_blocks_of_held_sequences_is_admitted() -> None:
    scheduler, _ = build(num_blocks=4)
    slow = sequence("a", 12, 3)
    scheduler.add(slow)
    run(scheduler)
    scheduler.hold(slow)
    scheduler.add(sequence("b", 12, 3))
    assert run(scheduler) == {"b": 12}
    assert slow.status is Status.PREEMPTED


def test_choices_do_not_wait_for_the_prompt_of_one_that_is_held() -> None:
    scheduler, _ = build(budget=4)
    first, second = (sequence(name, 9, group="g") for name in "ab")
    scheduler.add(first)
    scheduler.add(second)
    assert run(scheduler) == {"a": 4}
    scheduler.hold(first)
    # its first block is in the cache, and the rest computed by the one that leads now
    assert [run(scheduler), run(scheduler)] == [{"b": 4}, {"b": 1}]
    scheduler.release(first)
    assert run(scheduler) == {"a": 3, "b": 1}


def test_who_is_held_while_preempted_comes_back_to_the_front() -> None:
    scheduler, _ = build(num_blocks=5)
    old, young = sequence("a", 8, 9), sequence("b", 3, 9)
    for item in (old, young, sequence("c", 5, 9)):
        scheduler.add(item)
    while young.status is not Status.PREEMPTED:
        run(scheduler)
    scheduler.hold(young)
    scheduler.remove(old)
    assert "b" not in run(scheduler)
    scheduler.release(young)
    assert "b" in run(scheduler)


def test_keys_take_turns_and_batch_comes_later() -> None:
    scheduler, _ = build(seqs=1, budget=64)
    waiting = [
        *(sequence(f"{index}", share=b"a") for index in range(3)),
        sequence("x", share=b"x", priority="batch"),
        sequence("b", share=b"b"),
    ]
    for item in waiting:
        scheduler.add(item)
    assert scheduler.places() == {"0": 1, "b": 2, "1": 3, "2": 4, "x": 5}
    order = []
    while scheduler.has_work:
        [name] = run(scheduler)
        order.append(name)
        scheduler.remove(next(item for item in waiting if item.seq_id == name))
    assert order == ["0", "b", "1", "2", "x"]
