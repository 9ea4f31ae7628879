"""Sequences with adapters of their own in one engine: each says what it says alone, and what the
merged weights say; none shares what it must not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chatserve.engine.adapters import Adapters
from chatserve.engine.engine import Engine
from chatserve.engine.sequence import LoadedAdapter, SamplingParams, TokenEvent
from chatserve.errors import ModelNotFound
from chatserve.models.checkpoint import Checkpoint, open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.llama import Llama
from chatserve.models.llama_kernels import KernelLlama
from chatserve.models.loader import load_model
from chatserve.models.merge import merge
from tests import adapters, tiny
from tests.unit.engine.scripted import ByteTokenizer, drain

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=24, seed=3, ignore_eos=True)
PROMPTS = {"sql": list(range(40)), "law": [*range(200, 250), *range(20)], None: [5, 6, 7]}


@dataclass(frozen=True)
class House:
    """A base with two adapters beside it."""

    folder: Path
    checkpoint: Checkpoint
    model: Llama | KernelLlama
    adapters: Mapping[str, LoadedAdapter]
    block_size: int

    def engine(self, num_blocks: int = 125, **options: Any) -> Engine:
        return engine_of(self.model, num_blocks, self.block_size, **options)

    def of(self, name: str | None) -> LoadedAdapter | None:
        return None if name is None else self.adapters[name]


def engine_of(model: Any, num_blocks: int, block_size: int, **options: Any) -> Engine:
    return Engine(
        model, ByteTokenizer(), num_kv_tokens=num_blocks * block_size, block_size=block_size,
        **options,
    )  # fmt: skip


def load(folder: Path, load_8bit: bool, paths: Sequence[Path] = ()) -> tuple[Checkpoint, Any]:
    checkpoint = merge(open_checkpoint(folder), paths)
    with closing(checkpoint.weights):
        policy = choose_policy("cpu", "float32", load_8bit=load_8bit)
        return checkpoint, load_model(checkpoint, policy)


@pytest.fixture(scope="module", params=["torch", "kernels"])
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder / "base")
    for seed, (name, targets) in enumerate((("sql", ALL), ("law", ("q_proj", "v_proj")))):
        pairs = adapters.random_pairs(adapters.tiny_shapes(targets), rank=4 + seed, seed=seed)
        adapters.write(folder / name, pairs, r=4 + seed, lora_alpha=16, target_modules=targets)
    is_kernels = request.param == "kernels"
    if is_kernels and choose_policy("cpu", load_8bit=True).kernels is None:
        pytest.skip("the CPU kernels are not here")
    checkpoint, model = load(folder / "base", is_kernels)
    table = Adapters(checkpoint, model)
    block_size = 32 if is_kernels else 8
    engine_of(model, 4, block_size)  # the kernels want a pool before an adapter
    for name in ("sql", "law"):
        table.load(name, folder / name)
    return House(folder, checkpoint, model, table.loaded(), block_size)


def texts(events: Mapping[str, list[TokenEvent]]) -> dict[str, list[int]]:
    return {
        name: [id_ for event in each for id_ in event.token_ids] for name, each in events.items()
    }


def run(
    house: House,
    names: Sequence[str | None],
    params: SamplingParams = GREEDY,
    num_blocks: int = 125,
    **options: Any,
) -> dict[str, list[int]]:
    engine = house.engine(num_blocks, **options)
    for name in names:
        engine.add(str(name), PROMPTS[name], params, adapter=house.of(name))
    return texts(drain(engine))


@pytest.fixture(scope="module")
def alone(house: House) -> dict[str, list[int]]:
    return {str(name): run(house, [name])[str(name)] for name in PROMPTS}


def test_each_says_what_its_merged_weights_say(house: House, alone: dict[str, list[int]]) -> None:
    if isinstance(house.model, KernelLlama):
        pytest.skip("8 bits round merged weights otherwise; tests/unit/kernels compares logits")
    for name in ("sql", "law"):
        _, merged = load(house.folder / "base", False, [house.folder / name])
        engine = engine_of(merged, 125, house.block_size)
        engine.add(name, PROMPTS[name], GREEDY)
        assert texts(drain(engine)) == {name: alone[name]}


def test_adapters_change_what_is_said(house: House, alone: dict[str, list[int]]) -> None:
    for name in ("sql", "law"):
        engine = house.engine()
        engine.add(name, PROMPTS[name], GREEDY)
        assert texts(drain(engine)) != {name: alone[name]}


@pytest.mark.parametrize(
    "options",
    [
        {}, {"max_num_batched_tokens": 7}, {"max_num_seqs": 1}, {"speculation": True},
    ],
    ids=str,
)  # fmt: skip
def test_batched_equals_alone(
    house: House, alone: dict[str, list[int]], options: dict[str, Any]
) -> None:
    assert run(house, ["law", None, "sql"], **options) == alone


def test_sampled_texts_are_the_same_in_any_company(house: House) -> None:
    expected = {str(name): run(house, [name], SAMPLED)[str(name)] for name in PROMPTS}
    assert run(house, ["law", None, "sql"], SAMPLED) == expected


def test_preempted_equals_undisturbed(house: House) -> None:
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    expected = {str(name): run(house, [name], params)[str(name)] for name in PROMPTS}
    engine = house.engine({8: 24, 32: 7}[house.block_size])
    for name in ("sql", "law", None):
        engine.add(str(name), PROMPTS[name], params, adapter=house.of(name))
    assert texts(drain(engine)) == expected
    assert engine.num_preempted > 0


def test_no_keys_and_values_are_shared_with_the_base_or_another_adapter(house: House) -> None:
    engine = house.engine()
    params = SamplingParams(max_tokens=1, temperature=0)

    def num_cached(adapter: str | None) -> int:
        engine.add("s", list(range(100)), params, adapter=house.of(adapter), salt=b"key")
        [[*_, last]] = drain(engine).values()
        return last.num_cached_tokens

    assert [num_cached(name) for name in (None, "sql", "law")] == [0, 0, 0]
    shared = [num_cached(name) for name in (None, "sql", "law")]
    assert shared == [96, 96, 96]


def test_a_sequence_keeps_its_adapter_when_it_is_unloaded(
    house: House, alone: dict[str, list[int]]
) -> None:
    table = Adapters(house.checkpoint, house.model)
    table.load("sql", house.folder / "sql")
    engine = house.engine()
    engine.add("sql", PROMPTS["sql"], GREEDY, adapter=table.loaded()["sql"])
    events = engine.step()
    table.unload("sql")
    with pytest.raises(ModelNotFound, match="no adapter 'sql'; loaded are: none"):
        table.unload("sql")
    while engine.has_work:
        events += engine.step()
    assert [id_ for event in events for id_ in event.token_ids] == alone["sql"]
