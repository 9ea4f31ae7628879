"""What a sequence says depends on nothing but itself: token for token.

On PyTorch's operators in float32, and on the CPU kernels in 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from chatserve.engine.engine import Engine
from chatserve.engine.sampler import Sampler
from chatserve.engine.sequence import SamplingParams
from chatserve.models.batch import Model
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.kernel_sampler import KernelSampler
from chatserve.models.llama import Llama
from chatserve.models.llama_kernels import KernelLlama
from chatserve.models.loader import load_model
from tests import tiny
from tests.unit.engine.scripted import ByteTokenizer, drain


@dataclass(frozen=True)
class House:
    """A network with the size of its blocks, and numbers of them that are too few for all."""

    model: Model[Any]
    block_size: int
    tight: Sequence[int]

    def build(self, num_blocks: int = 125, **options: Any) -> Engine:
        return Engine(
            self.model, ByteTokenizer(), num_kv_tokens=num_blocks * self.block_size,
            block_size=self.block_size, **options,
        )  # fmt: skip


HOUSES = {"torch": (False, 8, (17, 24, 27)), "kernels": (True, 32, (7,))}


@pytest.fixture(scope="module", params=HOUSES)
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> House:
    load_8bit, block_size, tight = HOUSES[request.param]
    policy = choose_policy("cpu", "float32", load_8bit=load_8bit)
    if load_8bit and policy.kernels is None:
        pytest.skip("the CPU kernels are not here")
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder)
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        model = load_model(checkpoint, policy)
    assert isinstance(model, KernelLlama) == load_8bit
    return House(model, block_size, tight)


PROMPTS = {"a": [5, 6, 7], "b": list(range(100)), "c": [9] * 64, "d": [1]}
MIXED = {
    "a": SamplingParams(max_tokens=20, seed=1, ignore_eos=True),
    "b": SamplingParams(max_tokens=30, temperature=0, ignore_eos=True),
    "c": SamplingParams(max_tokens=25, seed=2, top_p=0.9, presence_penalty=1, ignore_eos=True),
    "d": SamplingParams(max_tokens=15, seed=3, top_k=40, temperature=1.5, ignore_eos=True),
}


SAMPLERS = [
    SamplingParams(temperature=0, repetition_penalty=1.4),
    SamplingParams(seed=5, temperature=0.6, top_k=9, logprobs=20),
    SamplingParams(seed=5, min_p=0.05, frequency_penalty=0.7, logprobs=0),
    SamplingParams(seed=6, temperature=1.7, logit_bias={7: 4.0, 8: -100.0}),
    SamplingParams(seed=7, top_p=0.7, presence_penalty=-1.5, logprobs=5, prompt_logprobs=3),
    SamplingParams(temperature=0, min_tokens=9, stop=("a", "e"), logprobs=1),
]


def run(engine: Engine) -> dict[str, list[int]]:
    return {
        name: [token_id for event in events for token_id in event.token_ids]
        for name, events in drain(engine).items()
    }


def tokens(house: House, names: str, **options: Any) -> dict[str, list[int]]:
    engine = house.build(**options)
    baseline = engine.num_free_kv_tokens
    for name in names:
        engine.add(name, PROMPTS[name], MIXED[name])
    answers = run(engine)
    assert engine.num_free_kv_tokens == baseline
    return answers


@pytest.fixture(scope="module")
def alone(house: House) -> dict[str, list[int]]:
    return {name: tokens(house, name)[name] for name in PROMPTS}


def test_batched_equals_alone(house: House, alone: dict[str, list[int]]) -> None:
    assert tokens(house, "abcd") == alone


def test_every_sampler_is_of_its_own_row(house: House) -> None:
    def told(*numbers: int) -> dict[str, list[Any]]:
        engine = house.build(max_num_batched_tokens=48)
        for number in numbers:
            params = replace(SAMPLERS[number], max_tokens=18, ignore_eos=True)
            prompt_ids = list(range(10 + number, 40))
            for choice in (0, 1):
                engine.add(f"{number}-{choice}", prompt_ids, params, choice=choice)
        fields = ["text", "token_ids", "logprobs", "prompt_logprobs"]
        if not isinstance(house.model, KernelLlama):
            fields = fields[:2]  # a product of another shape rounds differently
        return {
            name: [each for field in fields for event in events for each in getattr(event, field)]
            for name, events in drain(engine).items()
        }

    together = told(*range(len(SAMPLERS)))
    for number in range(len(SAMPLERS)):
        for name, alone in told(number).items():
            assert alone == together[name]


def test_chunked_prefill_equals_whole(house: House, alone: dict[str, list[int]]) -> None:
    assert tokens(house, "abcd", max_num_batched_tokens=7) == alone


def test_waiting_equals_undisturbed(house: House, alone: dict[str, list[int]]) -> None:
    assert tokens(house, "dcba", max_num_seqs=1) == alone


def test_speculation_equals_step_by_step(house: House, alone: dict[str, list[int]]) -> None:
    assert tokens(house, "abcd", speculation=True) == alone
    for name in PROMPTS:
        assert tokens(house, name, speculation=True) == {name: alone[name]}


def test_preempted_equals_undisturbed(house: House, alone: dict[str, list[int]]) -> None:
    for num_blocks in house.tight:
        engine = house.build(num_blocks, max_num_batched_tokens=50)
        for name in "bacd":
            engine.add(name, PROMPTS[name], MIXED[name])
        assert run(engine) == alone
        assert engine.num_preempted > 0


@pytest.mark.parametrize("name", PROMPTS)
def test_cached_equals_uncached(house: House, alone: dict[str, list[int]], name: str) -> None:
    engine = house.build()
    num_full = len(PROMPTS[name]) // house.block_size * house.block_size
    for expected in (0, num_full):
        engine.add(name, PROMPTS[name], MIXED[name])
        last = drain(engine)[name][-1]
        assert last.num_cached_tokens == min(expected, len(PROMPTS[name]) - 1)
    engine.add(name, PROMPTS[name], MIXED[name])
    assert run(engine) == {name: alone[name]}


def test_the_next_turn_finds_the_answer_in_the_cache(
    house: House, alone: dict[str, list[int]]
) -> None:
    next_prompt = [*PROMPTS["b"], *alone["b"], 1, 2, 3]
    fresh, used = house.build(), house.build()
    used.add("b", PROMPTS["b"], MIXED["b"])
    run(used)
    for engine in (fresh, used):
        engine.add("next", next_prompt, MIXED["d"])
    events = drain(used)["next"]
    assert events[-1].num_cached_tokens == 128  # of 133
    assert run(fresh)["next"] == [id_ for event in events for id_ in event.token_ids]


@pytest.mark.parametrize("name", "bc")
@pytest.mark.parametrize("max_num_seqs", [1, 2, 9])
def test_forked_equals_alone(house: House, name: str, max_num_seqs: int) -> None:
    params = replace(MIXED[name], temperature=1.0, seed=7)
    together, separate = house.build(max_num_seqs=max_num_seqs), {}
    for choice in range(4):
        together.add(str(choice), PROMPTS[name], params, choice=choice, group="g")
        engine = house.build()
        engine.add(str(choice), PROMPTS[name], params, choice=choice)
        separate |= run(engine)
    assert run(together) == separate
    assert len({tuple(ids) for ids in separate.values()}) == 4


def test_a_seed_repeats_and_another_choice_differs(
    house: House, alone: dict[str, list[int]]
) -> None:
    engine = house.build()
    for choice in (0, 1):
        engine.add(str(choice), PROMPTS["a"], MIXED["a"], choice=choice)
    answers = run(engine)
    assert answers["0"] == alone["a"] != answers["1"]


def test_forbidden_ids_are_never_produced(alone: dict[str, list[int]]) -> None:
    produced = {token_id for ids in alone.values() for token_id in ids}
    assert not produced & ByteTokenizer.forbidden_ids


def test_a_batch_that_failed_half_way_leaves_no_trace(
    house: House, alone: dict[str, list[int]]
) -> None:
    """The first layers have stored keys and values when the last block raises."""
    model = house.model
    if not isinstance(model, Llama):
        pytest.skip("the kernels compute a step in one call")
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
        disturbed = tokens(house, "ab")
    finally:
        model.blocks[-1] = block
    assert num_calls > 4
    assert disturbed == {name: alone[name] for name in "ab"}


@pytest.mark.parametrize("speculation", [False, True])
def test_picked_ahead_equals_picked_after(
    house: House, monkeypatch: pytest.MonkeyPatch, speculation: bool
) -> None:
    if not isinstance(house.model, KernelLlama):
        pytest.skip("only the kernels pick while they compute")
    num_after = 0
    sample = KernelSampler.sample

    def count(self: KernelSampler, *arguments: Any) -> list[int]:
        nonlocal num_after
        num_after += 1
        return sample(self, *arguments)

    def answers() -> dict[str, list[int]]:
        engine = house.build(speculation=speculation)
        for name, params in MIXED.items():
            params = replace(params, repetition_penalty=1.2, min_tokens=5)
            engine.add(name, PROMPTS[name], params)
        return run(engine)

    with monkeypatch.context() as patch:
        patch.setattr(KernelSampler, "sample", count)
        ahead = answers()
    monkeypatch.setattr(Sampler, "ahead", lambda self, states: None)
    assert ahead == answers()
    assert speculation or not num_after  # only a draft's tokens are picked after
