"""What a sequence computes among others is what it computes alone, bit for bit.

On the CPU kernels always. On PyTorch's operators, which round a row differently among others, when
sequences run one by one and by blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.engine.engine import Engine
from chatserve.engine.sequence import SamplingParams
from chatserve.errors import UsageError
from chatserve.models.batch import Batch, Model, Segment
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.llama_kernels import KernelLlama
from chatserve.models.loader import load_model
from chatserve.models.one_by_one import OneByOne
from tests import tiny
from tests.unit.engine.scripted import ByteTokenizer, drain

BLOCK = 32
PROMPT = [(7 * i) % 250 for i in range(100)]
OTHERS = [[1, 2, 3], [9] * 64, [(5 * i) % 250 for i in range(77)], PROMPT, PROMPT[:96]]
PARAMS = SamplingParams(max_tokens=8, seed=3, ignore_eos=True)

Logits = dict[int, torch.Tensor]


class Watched:
    """Keeps what a network says of the sequence x, by position."""

    def __init__(self, model: Model[Any]) -> None:
        self._model = model
        self.vocab_size = model.vocab_size
        self.hidden_size = model.hidden_size
        self.logits: Logits = {}
        self.engine: Engine

    def build_kv_pool(self, num_blocks: int, block_size: int) -> Any:
        return self._model.build_kv_pool(num_blocks, block_size)

    def forward(self, batch: Batch, pool: Any) -> torch.Tensor:
        logits = self._model.forward(batch, pool)
        live = self.engine._live.get("x")
        for index, row in enumerate(batch.output_rows):
            segment = next(s for s in batch.segments if s.start <= row < s.start + s.num_tokens)
            if live is not None and segment.block_ids is live.sequence.table.block_ids:
                self.logits[batch.positions[row]] = logits[index].clone()
        return logits


@dataclass(frozen=True)
class House:
    model: Model[Any]
    on_kernels: bool

    def build(self, num_blocks: int = 80, *, is_plain: bool = False, **options: Any) -> Engine:
        """`is_plain`: as without --deterministic."""
        is_alone = not self.on_kernels and not is_plain
        watched = Watched(OneByOne(self.model) if is_alone else self.model)
        engine = Engine(
            watched, ByteTokenizer(), num_kv_tokens=num_blocks * BLOCK, block_size=BLOCK,
            by_blocks=is_alone, **options,
        )  # fmt: skip
        watched.engine = engine
        return engine


FORMS: dict[str, dict[str, Any]] = {
    "torch-float32": {"dtype": "float32"},
    "torch-bfloat16": {"dtype": "bfloat16"},
    "kernels-8": {"load_8bit": True},
    "kernels-8-fine": {"load_8bit": True, "quant_group": "32"},
    "kernels-4": {"load_4bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder, hidden_size=128, intermediate_size=256)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small take longer by several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=FORMS)
def house(request: pytest.FixtureRequest, folder: Path) -> House:
    try:
        policy = choose_policy("cpu", **FORMS[request.param])
    except UsageError as error:
        pytest.skip(error.message)
    if policy.packing is not None and policy.kernels is None:
        pytest.skip("the CPU kernels are not here")
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        model = load_model(checkpoint, policy)
    assert isinstance(model, KernelLlama) == (policy.packing is not None)
    return House(model, isinstance(model, KernelLlama))


def run(engine: Engine, prompt: Sequence[int] = PROMPT) -> Logits:
    """What the network says while the sequence x, and what is there already, runs to its end."""
    watched = engine.model
    assert isinstance(watched, Watched)
    engine.add("x", prompt, PARAMS, group="x")
    drain(engine)
    assert set(watched.logits) == set(range(len(prompt) - 1, len(prompt) + PARAMS.max_tokens - 1))
    return watched.logits


def add_others(engine: Engine, max_tokens: int = 8) -> None:
    params = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
    for index, prompt in enumerate(OTHERS):
        engine.add(str(index), prompt, params)


def is_same(actual: Logits, expected: Logits) -> bool:
    return actual.keys() == expected.keys() and all(
        torch.equal(actual[position], expected[position]) for position in expected
    )


@pytest.fixture(scope="module")
def alone(house: House) -> Logits:
    return run(house.build())


def test_among_others(house: House, alone: Logits) -> None:
    engine = house.build()
    add_others(engine)
    assert is_same(run(engine), alone)


def test_while_others_decode(house: House, alone: Logits) -> None:
    engine = house.build()
    add_others(engine)
    for _ in range(6):
        engine.step()
    assert engine.num_running == len(OTHERS)
    assert is_same(run(engine), alone)


def test_in_steps_of_other_sizes(house: House, alone: Logits) -> None:
    engine = house.build(max_num_batched_tokens=7)
    add_others(engine, 2)
    assert is_same(run(engine), alone)


@pytest.mark.parametrize("first", [PROMPT, PROMPT[:40]])
def test_with_a_beginning_from_the_cache(house: House, alone: Logits, first: list[int]) -> None:
    engine = house.build()
    engine.add("first", first, PARAMS)
    drain(engine)
    engine.add("x", PROMPT, PARAMS)
    engine.step()
    assert engine._live["x"].sequence.num_cached_tokens == len(first) // BLOCK * BLOCK
    engine.abort("x")
    assert is_same(run(engine), alone)


@pytest.mark.parametrize("num_tokens", [32, 97])
def test_prompts_that_end_with_a_block(house: House, num_tokens: int) -> None:
    prompt = PROMPT[:num_tokens]
    expected = run(house.build(), prompt)
    engine = house.build()
    add_others(engine, 1)
    drain(engine)
    assert is_same(run(engine, prompt), expected)


def test_answers_of_others_that_have_become_its_prompt(house: House) -> None:
    """Their keys and values were computed one by one, the prompt's are not."""
    engine = house.build()
    engine.add("before", PROMPT[:50], SamplingParams(max_tokens=40, seed=2, ignore_eos=True))
    said = [id_ for event in drain(engine)["before"] for id_ in event.token_ids]
    prompt = [*PROMPT[:50], *said, 1, 2, 3]
    expected = run(house.build(), prompt)
    assert is_same(run(engine, prompt), expected)


def test_others_prompts_that_hold_its_answer(house: House) -> None:
    """And the other way round: it computes its tokens a second time, after it was preempted."""
    prompt = PROMPT[:60]
    expected = run(house.build(), prompt)
    sure = house.build()
    sure.add("x", prompt, PARAMS)
    said = [id_ for event in drain(sure)["x"] for id_ in event.token_ids]
    engine = house.build()
    engine.add("longer", [*prompt, *said, *PROMPT], SamplingParams(max_tokens=1))
    drain(engine)
    watched = engine.model
    assert isinstance(watched, Watched)
    engine.add("x", prompt, PARAMS)
    for _ in range(6):
        engine.step()
    scheduler = engine._scheduler
    scheduler._preempt(engine._live["x"].sequence)
    drain(engine)
    assert scheduler.num_preempted == 1
    assert is_same(watched.logits, expected)


@pytest.mark.parametrize("first_tokens", [1, 8])
def test_choices_of_one_request(house: House, first_tokens: int) -> None:
    """Each is what it is without those before it, however long they last."""
    engine = house.build()
    params = SamplingParams(max_tokens=first_tokens, seed=3, ignore_eos=True)
    engine.add("first", PROMPT, params, group="x")
    watched = engine.model
    assert isinstance(watched, Watched)
    engine.add("x", PROMPT, PARAMS, group="x", choice=1)
    drain(engine)
    separate = house.build()
    separate.add("x", PROMPT, PARAMS, choice=1)
    drain(separate)
    assert isinstance(separate.model, Watched)
    assert is_same(watched.logits, separate.model.logits)


def test_without_it_others_change_the_bits(house: House) -> None:
    """Else there would be nothing to be had for the price."""
    if house.on_kernels:
        pytest.skip("nothing to switch off: the kernels' rows do not depend on each other")
    alone = run(house.build(is_plain=True))
    engine = house.build(is_plain=True)
    add_others(engine, 40)
    if is_same(run(engine), alone):
        pytest.skip("this machine's products round a row alike among others")


def test_every_field_of_a_batch_is_handed_on() -> None:
    """Whoever adds a field to `Batch` has to tell `OneByOne` what it means for one segment."""
    known = {"token_ids", "positions", "segments", "output_rows", "ahead"}
    known |= {"hidden_rows", "hidden"}
    assert {field.name for field in fields(Batch)} == known


class OneMemory:
    """Says where each sequence begins, always in the same memory, as CUDA graphs do."""

    vocab_size = hidden_size = 1

    def __init__(self) -> None:
        self._memory = torch.zeros(1, 1)

    def build_kv_pool(self, num_blocks: int, block_size: int) -> Any:
        return None

    def forward(self, batch: Batch, pool: Any) -> torch.Tensor:
        assert [segment.start for segment in batch.segments] == [0]
        if batch.hidden is not None:
            batch.hidden.copy_(torch.tensor(batch.hidden_rows)[:, None])
        return self._memory.fill_(batch.token_ids[0])[: len(batch.output_rows)]


def test_what_a_sequence_got_is_not_overwritten_by_the_next() -> None:
    segments = [Segment(0, 2, 0, [0]), Segment(2, 1, 5, [1])]
    batch = Batch([7, 8, 9], [0, 1, 5], segments, [1, 2])
    assert OneByOne(OneMemory()).forward(batch, None).tolist() == [[7], [9]]


def test_hidden_states_go_to_the_rows_that_asked_for_them() -> None:
    segments = [Segment(0, 3, 0, [0]), Segment(3, 2, 0, [1]), Segment(5, 2, 0, [2])]
    hidden = torch.zeros(4, 1)
    batch = Batch([1] * 7, [0, 1, 2, 0, 1, 0, 1], segments, [4], None, [0, 2, 5, 6], hidden)
    assert OneByOne(OneMemory()).forward(batch, None).shape == (1, 1)
    assert hidden.tolist() == [[0], [2], [0], [1]]


def test_a_step_without_any_logits(house: House) -> None:
    engine = house.build()
    for name, prompt in {"a": PROMPT, "b": PROMPT[::-1]}.items():
        engine.add(name, prompt, PARAMS)
    if not house.on_kernels:  # they compute both prompts at once
        assert engine.step() == []
        assert engine.num_running == 2
