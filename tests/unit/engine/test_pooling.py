"""Embeddings come out of the engine beside all else, and depend on nothing but the prompt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from chatserve.engine.engine import Engine
from chatserve.engine.pooling import Pooler
from chatserve.engine.sequence import Pooling, SamplingParams, TokenEvent
from chatserve.errors import GenerationFailed
from chatserve.models.batch import Batch
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.loader import load_model
from tests import tiny
from tests.networks import Solo
from tests.unit.engine.scripted import ByteTokenizer, drain

PROMPT = [(37 * i) % 250 for i in range(100)]
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
Vector = NDArray[np.float32]


def params(pooling: Pooling) -> SamplingParams:
    return SamplingParams(max_tokens=0, pooling=pooling)


@dataclass(frozen=True)
class House:
    """A network, and whether its rows are the same to the bit whatever lies beside them."""

    model: Any
    is_exact: bool

    def engine(self, num_blocks: int = 40, **options: Any) -> Engine:
        return Engine(self.model, ByteTokenizer(), num_kv_tokens=32 * num_blocks, **options)

    def assert_same(self, found: Vector | None, expected: Vector | torch.Tensor) -> None:
        assert found is not None
        assert found.dtype == np.float32
        if self.is_exact:
            assert np.array_equal(found, np.asarray(expected))
        else:
            assert np.abs(found - np.asarray(expected)).max() < 1e-5 * np.abs(found).max()


@pytest.fixture(scope="module", params=["torch", "kernels"])
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> House:
    is_exact = request.param == "kernels"
    policy = choose_policy("cpu", "float32", load_8bit=is_exact)
    if is_exact and policy.kernels is None:
        pytest.skip("the CPU kernels are not here")
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder)
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        return House(load_model(checkpoint, policy), is_exact)


def embed(engine: Engine, pooling: Pooling, prompt: list[int] = PROMPT, name: str = "e") -> Vector:
    engine.add(name, prompt, params(pooling))
    [event] = drain(engine)[name]
    assert event.embedding is not None
    return event.embedding


def states_of(house: House) -> torch.Tensor:
    with torch.inference_mode():
        return Solo(house.model).feed_for_states(PROMPT)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("budget", [512, 7])
def test_it_is_made_of_the_states_however_the_prompt_is_cut(
    house: House, pooling: Pooling, budget: int
) -> None:
    states = states_of(house).double()
    engine = house.engine(max_num_batched_tokens=budget, max_num_seqs=4)
    engine.add("e", PROMPT, params(pooling))
    [event] = drain(engine)["e"]
    assert event == TokenEvent("e", num_prompt_tokens=100, finish_reason="length")
    whole = np.add.reduce(states.numpy()) / 100 if pooling == "mean" else states[-1].numpy()
    house.assert_same(event.embedding, whole.astype(np.float32))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_neighbours_change_nothing(house: House, pooling: Pooling) -> None:
    prompts = {f"e{i}": PROMPT[i:] for i in (0, 1, 50, 99)}
    alone = {name: embed(house.engine(), pooling, prompt) for name, prompt in prompts.items()}
    engine = house.engine(max_num_batched_tokens=48)
    engine.add("chat", PROMPT[3:20], LONG)
    said = [id_ for _ in range(3) for event in engine.step() for id_ in event.token_ids]
    assert len(said) == 3
    for name, prompt in prompts.items():
        engine.add(name, prompt, params(pooling))
    events = drain(engine)
    for name, expected in alone.items():
        house.assert_same(events[name][-1].embedding, expected)
    text = drain_one(house.engine(), PROMPT[3:20])
    said += [id_ for event in events["chat"] for id_ in event.token_ids]
    assert said == text


def drain_one(engine: Engine, prompt: list[int]) -> list[int]:
    engine.add("chat", prompt, LONG)
    return [id_ for event in drain(engine)["chat"] for id_ in event.token_ids]


def test_only_the_last_state_can_come_from_the_cache(house: House) -> None:
    engine = house.engine()
    first = embed(engine, "last")
    engine.add("again", PROMPT, params("last"))
    [event] = drain(engine)["again"]
    assert event.num_cached_tokens == 96
    house.assert_same(event.embedding, first)
    engine.add("mean", PROMPT, params("mean"))
    [event] = drain(engine)["mean"]
    assert event.num_cached_tokens == 0
    house.assert_same(event.embedding, embed(house.engine(), "mean"))


@pytest.mark.parametrize("by_blocks", [False, True])
def test_means_take_no_place_in_the_cache(house: House, by_blocks: bool) -> None:
    engine = house.engine(by_blocks=by_blocks)
    embed(engine, "mean")
    engine.add("chat", PROMPT, SamplingParams(max_tokens=1))
    assert drain(engine)["chat"][-1].num_cached_tokens == 0


def test_preempted_in_the_middle_it_starts_anew(house: House) -> None:
    prompt = PROMPT * 3
    alone = embed(house.engine(), "mean", prompt)
    # room for both chats and the prompt, and one more block; both need another while it is computed
    engine = house.engine(num_blocks=3 + 2 + 10 + 1, max_num_batched_tokens=16)
    engine.add("a", PROMPT[:80], LONG)
    engine.add("b", PROMPT[1:61], LONG)
    engine.add("e", prompt, params("mean"))
    events = drain(engine)
    assert engine.num_preempted > 0
    house.assert_same(events["e"][-1].embedding, alone)


def test_aborted_in_the_middle_it_leaves_nothing(house: House) -> None:
    engine = house.engine(max_num_batched_tokens=16)
    free = engine.num_free_kv_tokens
    engine.add("e", PROMPT, params("mean"))
    engine.step()
    assert engine.num_free_kv_tokens < free
    engine.abort("e")
    assert (engine.num_free_kv_tokens, engine.has_work) == (free, False)
    house.assert_same(embed(engine, "mean"), embed(house.engine(), "mean"))


class Faulty:
    """A network whose `fault` may spoil or refuse a batch."""

    def __init__(self, model: Any, fault: Callable[[Batch, torch.Tensor], None]) -> None:
        self._model = model
        self._fault = fault
        self.vocab_size, self.hidden_size = model.vocab_size, model.hidden_size

    def build_kv_pool(self, num_blocks: int, block_size: int) -> Any:
        return self._model.build_kv_pool(num_blocks, block_size)

    def forward(self, batch: Batch, pool: Any) -> torch.Tensor:
        logits: torch.Tensor = self._model.forward(batch, pool)
        self._fault(batch, logits)
        return logits


def test_a_batch_that_failed_is_counted_once(house: House) -> None:
    def fault(batch: Batch, logits: torch.Tensor) -> None:
        if len(batch.segments) > 1:
            raise ValueError("together they fail")

    engine = Engine(
        Faulty(house.model, fault), ByteTokenizer(), num_kv_tokens=1280, max_num_batched_tokens=48
    )
    for name in ("a", "b"):
        engine.add(name, PROMPT, params("mean"))
    events = drain(engine)
    for name in ("a", "b"):
        house.assert_same(events[name][-1].embedding, embed(house.engine(), "mean"))


def test_a_batch_that_fails_behind_the_network_is_counted_once(house: House) -> None:
    """A scored neighbour without finite logits: all of the batch run again, each alone."""

    def fault(batch: Batch, logits: torch.Tensor) -> None:
        logits.fill_(torch.nan)

    engine = Engine(
        Faulty(house.model, fault), ByteTokenizer(), num_kv_tokens=1280, max_num_batched_tokens=48
    )
    engine.add("scored", PROMPT[:9], SamplingParams(max_tokens=0, prompt_logprobs=0))
    engine.add("e", PROMPT, params("mean"))
    events = drain(engine)
    assert isinstance(events["scored"][-1].error, GenerationFailed)
    house.assert_same(events["e"][-1].embedding, embed(house.engine(), "mean"))


def test_states_that_are_no_numbers_fail_their_own_sequence_only(house: House) -> None:
    def fault(batch: Batch, logits: torch.Tensor) -> None:
        if batch.hidden is not None and batch.token_ids[batch.hidden_rows[0]] == 7:
            batch.hidden[0, 3] = torch.nan

    engine = Engine(Faulty(house.model, fault), ByteTokenizer(), num_kv_tokens=1280)
    engine.add("bad", [7, 8, 9], params("mean"))
    engine.add("good", PROMPT, params("last"))
    events = drain(engine)
    assert isinstance(events["bad"][-1].error, GenerationFailed)
    assert events["good"][-1].embedding is not None
    assert engine.num_free_kv_tokens == 1280


def test_sums_are_the_same_to_the_bit_for_every_cut() -> None:
    draw = torch.Generator().manual_seed(2)
    small, large = torch.randn(20, 13, generator=draw), torch.randn(15, 13, generator=draw) * 1e12
    # what is left of the large ones depends on the order of the additions
    states = torch.cat([large, small, -large])[torch.randperm(50, generator=draw)]
    results = set()
    for cuts in ([50], [1, 50], [3, 4, 30, 50], list(range(1, 51))):
        pooler = Pooler("mean", 50)
        for first, end in zip([0, *cuts], cuts, strict=False):
            pooler.add(first, states[first:end])
        embedding = pooler.embedding()
        assert embedding is not None
        results.add(embedding.tobytes())
    assert len(results) == 1


def test_a_mean_and_the_last() -> None:
    states = torch.arange(12.0).view(4, 3)
    for pooling, expected in (("mean", [4.5, 5.5, 6.5]), ("last", [9, 10, 11])):
        pooler = Pooler(cast(Pooling, pooling), 4)
        if pooling == "mean":
            pooler.add(0, states[:3])
        pooler.add(3, states[3:])
        assert np.array_equal(np.asarray(pooler.embedding()), expected)


def test_a_sum_that_begins_anew_forgets() -> None:
    pooler = Pooler("mean", 2)
    pooler.add(0, torch.ones(1, 4))
    pooler.add(0, torch.full((2, 4), 3.0))
    assert np.array_equal(np.asarray(pooler.embedding()), [3, 3, 3, 3])
