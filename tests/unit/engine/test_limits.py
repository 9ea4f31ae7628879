"""A full pool, odd prompts, thousands of requests, aborts at every stage: nothing is lost.

The network remembers ids in the place of keys and values, so a wrong block changes the text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatserve.engine.engine import Engine
from chatserve.engine.sequence import SamplingParams
from chatserve.errors import ContextLengthExceeded, GenerationFailed
from tests.unit.engine.ledger import LedgerModel
from tests.unit.engine.scripted import ByteTokenizer, Scripted, drain

BLOCK_SIZE = 4


def build(
    num_blocks: int = 100, model: LedgerModel | None = None, **options: Any
) -> tuple[Engine, LedgerModel]:
    model = model or LedgerModel()
    num_kv_tokens = num_blocks * BLOCK_SIZE
    engine = Engine(
        model, ByteTokenizer(), num_kv_tokens=num_kv_tokens, block_size=BLOCK_SIZE, **options
    )
    return engine, model


def params(max_tokens: int = 8, *, is_greedy: bool = True) -> SamplingParams:
    temperature = 0.0 if is_greedy else 30.0
    return SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=5, ignore_eos=True)


@cache
def alone(
    prompt: tuple[int, ...], max_tokens: int, is_greedy: bool, choice: int, num_ids: int = 320
) -> list[int]:
    engine, _ = build(model=LedgerModel(num_ids))
    engine.add("x", prompt, params(max_tokens, is_greedy=is_greedy), choice=choice)
    return [token_id for event in drain(engine)["x"] for token_id in event.token_ids]


def test_a_prompt_longer_than_the_pool_is_refused_with_the_numbers() -> None:
    engine, _ = build(num_blocks=5)
    with pytest.raises(ContextLengthExceeded, match=r"need 29 .* holds 20"):
        engine.add("a", range(21), params())
    engine.add("a", range(12), params())
    assert drain(engine)["a"][-1].finish_reason == "length"


def test_thousands_of_tiny_requests_cost_the_same_each() -> None:
    engine, model = build(max_num_seqs=16)
    for index in range(3000):
        engine.add(str(index), [index % 200], params(1))
    events = drain(engine)
    assert len(events) == 3000 == model.num_computed_tokens
    assert engine.num_free_kv_tokens == 400


def test_thousands_that_wait_can_leave() -> None:
    engine, _ = build()
    for index in range(20_000):
        engine.add(str(index), [1, 2], params())
    for index in range(20_000):
        engine.abort(str(index))
    assert not engine.has_work


def test_a_prompt_that_is_cached_wholly_computes_one_token() -> None:
    engine, model = build()
    prompt = tuple(range(40))
    for _ in range(3):
        before = model.num_computed_tokens
        engine.add("a", prompt, params())
        answer = [token_id for event in drain(engine)["a"] for token_id in event.token_ids]
        assert answer == alone(prompt, 8, True, 0)
    assert model.num_computed_tokens - before == 8


def test_n_answers_compute_their_prompt_once() -> None:
    engine, model = build()
    prompt = tuple(range(41))
    for choice in range(5):
        engine.add(str(choice), prompt, params(1, is_greedy=False), choice=choice, group="g")
    events = drain(engine)
    assert model.num_computed_tokens == 41 + 4
    for choice in range(5):
        assert list(events[str(choice)][0].token_ids) == alone(prompt, 1, False, choice)


def at_prefill(engine: Engine) -> None:
    engine.add("a", range(30), params())
    engine.step()


def at_decode(engine: Engine) -> None:
    engine.add("a", range(3), params())
    for _ in range(4):
        engine.step()


def at_waiting(engine: Engine) -> None:
    engine.add("b", range(30), params(1))
    engine.add("a", range(30), params())
    engine.step()


def as_waiting_follower(engine: Engine) -> None:
    engine.add("b", range(30), params(1), group="g")
    engine.add("a", range(30), params(), choice=1, group="g")
    engine.step()


def as_running_follower(engine: Engine) -> None:
    engine.add("b", range(6), params(), group="g")
    engine.add("a", range(6), params(), choice=1, group="g")
    for _ in range(3):
        engine.step()


def as_leader(engine: Engine) -> None:
    engine.add("a", range(30), params(), group="g")
    engine.add("b", range(30), params(1), choice=1, group="g")
    engine.step()


def when_preempted(engine: Engine) -> None:
    engine.add("b", range(32), params(16))
    engine.add("a", range(40, 46), params(30))
    while not engine.num_preempted:
        engine.step()
    assert (engine.num_running, engine.num_waiting) == (1, 1)


STAGES = [
    at_prefill, at_decode, at_waiting, as_waiting_follower, as_running_follower, as_leader,
    when_preempted,
]  # fmt: skip


@pytest.mark.parametrize("reach", STAGES)
def test_an_abort_at_any_stage_frees_everything_and_harms_nobody(
    reach: Callable[[Engine], None],
) -> None:
    engine, _ = build(num_blocks=12, max_num_batched_tokens=8)
    spoken: list[int] = []
    reach(engine)
    engine.abort("a")
    rest = drain(engine)
    assert engine.num_free_kv_tokens == 48
    assert "a" not in rest
    for events in rest.values():
        spoken += [token_id for event in events for token_id in event.token_ids]
        assert events[-1].finish_reason == "length"
    # and what comes after finds the pool as it should be
    engine.add("c", range(20), params())
    answer = [token_id for event in drain(engine)["c"] for token_id in event.token_ids]
    assert answer == alone(tuple(range(20)), 8, True, 0)


def test_nothing_that_a_failed_sequence_computed_stays_in_the_cache() -> None:
    model = Scripted("x", eos=False)
    engine, _ = build(model=model)
    model.nan_first_ids.add(3)
    prompt = [3] * 20
    engine.add("a", prompt, params())
    assert isinstance(drain(engine)["a"][-1].error, GenerationFailed)
    model.nan_first_ids.clear()
    engine.add("a", prompt, params())
    assert drain(engine)["a"][-1].num_cached_tokens == 0
    assert engine.num_free_kv_tokens == 400


def test_the_answers_of_a_failed_leader_still_come() -> None:
    model = Scripted("x", eos=False)
    engine, _ = build(model=model)
    forward, errors = model.forward, [RuntimeError("boom")]

    def fails_once(*arguments: Any) -> Any:
        if errors:
            raise errors.pop()
        return forward(*arguments)

    model.forward = fails_once  # type: ignore[method-assign]
    for choice in range(3):
        engine.add(str(choice), range(10), params(), choice=choice, group="g")
    events = drain(engine)
    assert isinstance(events["0"][-1].error, GenerationFailed)
    assert [events[name][-1].finish_reason for name in "12"] == ["length", "length"]
    assert engine.num_free_kv_tokens == 400


REQUESTS = st.tuples(
    st.integers(0, 2),  # which beginning its prompt has
    st.integers(1, 30),  # prompt tokens
    st.integers(1, 18),  # max_tokens
    st.booleans(),  # greedy
    st.integers(1, 3),  # n
)
OPERATIONS = st.one_of(REQUESTS, REQUESTS, st.integers(1, 5), st.integers(-3, -1))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(OPERATIONS, max_size=25),
    st.integers(12, 16),
    st.integers(1, 5),
    st.integers(1, 20),
    st.sampled_from([1, 2, 3, 320]),
)
def test_any_traffic_in_any_pool_gives_each_the_text_it_has_alone(
    operations: list[Any], num_blocks: int, max_num_seqs: int, budget: int, num_ids: int
) -> None:
    """A tuple is a request, a positive number so many steps, a negative one an abort.

    The fewer ids the model says, the more of the drafts are right.
    """
    engine, _ = build(
        num_blocks,
        LedgerModel(num_ids),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        speculation=True,
    )
    expected: dict[str, list[int]] = {}
    spoken: dict[str, list[int]] = {}

    def step() -> None:
        for event in engine.step():
            spoken[event.seq_id] += event.token_ids

    for index, operation in enumerate(operations):
        if isinstance(operation, tuple):
            start, num_tokens, max_tokens, is_greedy, n = operation
            prompt = tuple(range(start, start + num_tokens))
            for choice in range(n):
                name = f"{index}-{choice}"
                how = params(max_tokens, is_greedy=is_greedy)
                engine.add(name, prompt, how, choice=choice, group=str(index))
                expected[name] = alone(prompt, max_tokens, is_greedy, choice, num_ids)
                spoken[name] = []
        elif operation > 0:
            for _ in range(operation):
                step()
        elif expected:
            name = list(expected)[operation % len(expected)]
            engine.abort(name)
            del expected[name]
    for _ in range(5000):
        if not engine.has_work:
            break
        step()
    assert {name: spoken[name] for name in expected} == expected
    assert engine.num_free_kv_tokens == num_blocks * BLOCK_SIZE
