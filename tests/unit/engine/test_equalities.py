"""What a sequence says depends on nothing but itself: token for token, on a float32 network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from chatserve.engine.engine import Engine
from chatserve.engine.sequence import SamplingParams
from chatserve.models.config import ModelConfig
from chatserve.models.device import choose_policy
from chatserve.models.llama import Llama
from tests import tiny
from tests.unit.engine.scripted import ByteTokenizer, drain


@pytest.fixture(scope="module")
def model() -> Llama:
    hf_model = tiny.build_hf_model()
    native = Llama(
        ModelConfig.from_hf(hf_model.config.to_dict()),
        choose_policy("cpu", "float32", load_8bit=False),
    )
    state = hf_model.state_dict()
    for name, place in native.destinations().items():
        place.target.load_rows(place.start, state[name])
    return native


PROMPTS = {"a": [5, 6, 7], "b": list(range(100)), "c": [9] * 16, "d": [1]}
MIXED = {
    "a": SamplingParams(max_tokens=20, seed=1, ignore_eos=True),
    "b": SamplingParams(max_tokens=30, temperature=0, ignore_eos=True),
    "c": SamplingParams(max_tokens=25, seed=2, top_p=0.9, presence_penalty=1, ignore_eos=True),
    "d": SamplingParams(max_tokens=15, seed=3, top_k=40, temperature=1.5, ignore_eos=True),
}
BLOCK_SIZE = 8


def build(model: Llama, num_kv_tokens: int = 1000, **options: Any) -> Engine:
    return Engine(
        model, ByteTokenizer(), num_kv_tokens=num_kv_tokens, block_size=BLOCK_SIZE, **options
    )


def run(engine: Engine) -> dict[str, list[int]]:
    return {
        name: [token_id for event in events for token_id in event.token_ids]
        for name, events in drain(engine).items()
    }


def tokens(model: Llama, names: str, **options: Any) -> dict[str, list[int]]:
    engine = build(model, **options)
    baseline = engine.num_free_kv_tokens
    for name in names:
        engine.add(name, PROMPTS[name], MIXED[name])
    answers = run(engine)
    assert engine.num_free_kv_tokens == baseline
    return answers


@pytest.fixture(scope="module")
def alone(model: Llama) -> dict[str, list[int]]:
    return {name: tokens(model, name)[name] for name in PROMPTS}


def test_batched_equals_alone(model: Llama, alone: dict[str, list[int]]) -> None:
    assert tokens(model, "abcd") == alone


def test_chunked_prefill_equals_whole(model: Llama, alone: dict[str, list[int]]) -> None:
    assert tokens(model, "abcd", max_num_batched_tokens=7) == alone


def test_waiting_equals_undisturbed(model: Llama, alone: dict[str, list[int]]) -> None:
    assert tokens(model, "dcba", max_num_seqs=1) == alone


@pytest.mark.parametrize("num_blocks", [17, 19, 22])
def test_preempted_equals_undisturbed(
    model: Llama, alone: dict[str, list[int]], num_blocks: int
) -> None:
    engine = build(model, num_blocks * BLOCK_SIZE, max_num_batched_tokens=50)
    for name in "bacd":
        engine.add(name, PROMPTS[name], MIXED[name])
    assert run(engine) == alone
    assert engine.num_preempted > 0


@pytest.mark.parametrize("name", PROMPTS)
def test_cached_equals_uncached(model: Llama, alone: dict[str, list[int]], name: str) -> None:
    engine = build(model)
    for expected in (0, (len(PROMPTS[name]) // BLOCK_SIZE) * BLOCK_SIZE):
        engine.add(name, PROMPTS[name], MIXED[name])
        last = drain(engine)[name][-1]
        assert last.num_cached_tokens == min(expected, len(PROMPTS[name]) - 1)
    engine.add(name, PROMPTS[name], MIXED[name])
    assert run(engine) == {name: alone[name]}


def test_the_next_turn_finds_the_answer_in_the_cache(
    model: Llama, alone: dict[str, list[int]]
) -> None:
    next_prompt = [*PROMPTS["b"], *alone["b"], 1, 2, 3]
    fresh, used = build(model), build(model)
    used.add("b", PROMPTS["b"], MIXED["b"])
    run(used)
    for engine in (fresh, used):
        engine.add("next", next_prompt, MIXED["d"])
    events = drain(used)["next"]
    assert events[-1].num_cached_tokens == 128  # of 133
    assert run(fresh)["next"] == [id_ for event in events for id_ in event.token_ids]


@pytest.mark.parametrize("name", "bc")
@pytest.mark.parametrize("max_num_seqs", [1, 2, 9])
def test_forked_equals_alone(model: Llama, name: str, max_num_seqs: int) -> None:
    params = replace(MIXED[name], temperature=1.0, seed=7)
    together, separate = build(model, max_num_seqs=max_num_seqs), {}
    for choice in range(4):
        together.add(str(choice), PROMPTS[name], params, choice=choice, group="g")
        engine = build(model)
        engine.add(str(choice), PROMPTS[name], params, choice=choice)
        separate |= run(engine)
    assert run(together) == separate
    assert len({tuple(ids) for ids in separate.values()}) == 4


def test_a_seed_repeats_and_another_choice_differs(
    model: Llama, alone: dict[str, list[int]]
) -> None:
    engine = build(model)
    for choice in (0, 1):
        engine.add(str(choice), PROMPTS["a"], MIXED["a"], choice=choice)
    answers = run(engine)
    assert answers["0"] == alone["a"] != answers["1"]


def test_forbidden_ids_are_never_produced(alone: dict[str, list[int]]) -> None:
    produced = {token_id for ids in alone.values() for token_id in ids}
    assert not produced & ByteTokenizer.forbidden_ids


def test_a_batch_that_failed_half_way_leaves_no_trace(
    model: Llama, alone: dict[str, list[int]]
) -> None:
    """The first layers have stored keys and values when the last block raises."""
    block = model.blocks[-1]
    num_calls = 0

    def fails_once(*arguments: Any) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 4:
            raise RuntimeError("a kernel failed")
        return block(*arguments)

    model.blocks[-1] = fails_once  # type: ignore[call-overload]
    try:
        disturbed = tokens(model, "ab")
    finally:
        model.blocks[-1] = block
    assert num_calls > 4
    assert disturbed == {name: alone[name] for name in "ab"}
