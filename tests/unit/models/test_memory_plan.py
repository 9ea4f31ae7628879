"""The memory plan: figures of known models on paper, and equal to what a built network holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.errors import DoesNotFit
from chatserve.kernels.library import BLOCK_SIZE
from chatserve.models import loader, memory_plan
from chatserve.models.checkpoint import Checkpoint, open_checkpoint
from chatserve.models.config import ModelConfig
from chatserve.models.device import DevicePolicy, choose_policy, policy_for
from chatserve.models.kernel_matrix import GateUpRows, KernelMatrix, Table, Vector
from chatserve.models.linear import Int4Linear, Int8Linear, Linear, Parameter
from chatserve.models.loader import load_model
from chatserve.models.memory_plan import MIN_CONTEXT, MemoryPlan, plan_memory, weights_bytes
from chatserve.models.packing import FINE, Packing
from chatserve.models.weight_file import WeightFile
from tests import tiny
from tests.sparse import llama, write_sparse

INT4 = Packing(bits=4, is_grouped=True)


@pytest.mark.parametrize(
    ("name", "half", "most_in_8_bits", "most_in_4_bits"),
    [("7B", 13_476_831_232, 7.5e9, 4.5e9), ("13B", 26_031_728_640, 14e9, 8e9)],
)
def test_the_figures_of_7b_and_13b_on_paper(
    name: str, half: int, most_in_8_bits: float, most_in_4_bits: float
) -> None:
    config = ModelConfig.from_hf(llama(name))
    plain = choose_policy("cpu", "bfloat16")
    assert weights_bytes(config, plain) == half
    num_packed = half / 2 - 2 * config.vocab_size * config.hidden_size
    for policy in (
        choose_policy("cpu", "bfloat16", load_8bit=True),
        policy_for("mps", torch.float16, load_8bit=True),
    ):
        assert num_packed < weights_bytes(config, policy) <= most_in_8_bits
    four = choose_policy("cpu", "bfloat16", load_4bit=True)
    assert num_packed / 2 < weights_bytes(config, four) <= most_in_4_bits


def test_keys_and_values_of_7b_take_a_gibibyte_for_2048_tokens() -> None:
    assert 2048 * memory_plan.kv_bytes_per_token(llama("7B"), 2) == 1 << 30


def test_a_13b_checkpoint_is_planned_from_its_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_sparse(tmp_path / "vicuna-13b", llama("13B"))
    assert sum(path.stat().st_size for path in folder.iterdir()) > 26_000_000_000
    num_read = 0
    real = WeightFile._checked

    def counted(self: WeightFile, offset: int, num_bytes: int) -> int:
        nonlocal num_read
        num_read += num_bytes
        return real(self, offset, num_bytes)

    monkeypatch.setattr(WeightFile, "_checked", counted)
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        plan = plan_memory(checkpoint, choose_policy("cpu", load_8bit=True), context=2048)
    assert 13.0e9 < plan.weights_bytes < 14e9
    assert plan.kv_bytes == 2048 * 2 * 40 * 5120 * 2
    assert plan.total_bytes < 16e9  # the card that 13B in 8 bits is said to fit
    assert num_read < 100_000


def held_bytes(target: Any) -> int:
    """What one part of a network holds, biases apart."""
    if isinstance(target, GateUpRows):
        target = target._matrix
    if isinstance(target, KernelMatrix):
        return target.num_bytes
    if isinstance(target, (Vector, Table)):
        return target.values.nbytes
    if isinstance(target, Int8Linear):
        return target.codes.nbytes + target.scales.nbytes
    if isinstance(target, Int4Linear):
        return target.packed.nbytes + target.scales.nbytes
    assert isinstance(target, (Linear, Parameter))
    return target.weight.nbytes


POLICIES = {
    "float32": lambda: choose_policy("cpu", "float32"),
    "bfloat16": lambda: choose_policy("cpu", "bfloat16"),
    "int8": lambda: choose_policy("cpu", "bfloat16", load_8bit=True),
    "int8, float32 table": lambda: choose_policy("cpu", "float32", load_8bit=True),
    "fine": lambda: choose_policy("cpu", "bfloat16", load_8bit=True, quant_group="32"),
    "int4": lambda: choose_policy("cpu", "bfloat16", load_4bit=True),
    "int4 with minima": lambda: dataclasses.replace(
        choose_policy("cpu", "bfloat16", load_4bit=True),
        packing=Packing(bits=4, is_grouped=True, has_minima=True),
    ),
    "int8 of PyTorch": lambda: dataclasses.replace(
        policy_for("cpu", torch.bfloat16, load_8bit=True), reasons=()
    ),
    "int4 of CUDA": lambda: dataclasses.replace(
        policy_for("cuda", torch.bfloat16, load_8bit=True), packing=INT4
    ),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    ("model_type", "tied"), [("llama", False), ("llama", True), ("qwen2", True), ("qwen3", False)]
)
def test_the_plan_is_what_the_network_holds(
    name: str, model_type: str, tied: bool, tmp_path: Path
) -> None:
    tiny.save_model(
        tmp_path, model_type, vocab_size=4000, hidden_size=256, intermediate_size=544,
        head_dim=64, tie_word_embeddings=tied,
    )  # fmt: skip
    checkpoint = open_checkpoint(tmp_path)
    with closing(checkpoint.weights):
        policy = POLICIES[name]()
        model: Any = load_model(checkpoint, policy)
        plan = plan_memory(checkpoint, policy)
    targets = {id(place.target): place.target for place in model.destinations().values()}
    held = sum(map(held_bytes, targets.values()))
    # the kernels leave 256 bytes behind each buffer, and round vectors up to whole panels
    assert plan.weights_bytes == pytest.approx(held, abs=600 * len(targets))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    tiny.save_model(tmp_path)
    opened = open_checkpoint(tmp_path)
    with closing(opened.weights):
        yield opened


def float32() -> DevicePolicy:
    return choose_policy("cpu", "float32")


def test_the_loader_takes_exactly_what_the_plan_says(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = plan_memory(checkpoint, float32()).least_bytes
    monkeypatch.setattr(loader, "available_bytes", lambda device: least)
    assert load_model(checkpoint, float32())
    monkeypatch.setattr(loader, "available_bytes", lambda device: least - 1)
    with pytest.raises(DoesNotFit):
        load_model(checkpoint, float32())


def plan_of(**changes: Any) -> MemoryPlan:
    values: dict[str, Any] = {
        "device": "cpu", "form": "int8", "weights_bytes": 7_000_000, "kv_bytes_per_token": 1000,
        "activation_bytes": 300_000, "process_bytes": 400_000, "spare_bytes": 50_000,
        "context": 1024, "concurrency": 4, **changes,
    }  # fmt: skip
    return MemoryPlan(**values)


def test_parts_add_up() -> None:
    plan = plan_of(context=1000)
    assert plan.num_kv_tokens == 4 * 1024  # whole blocks
    assert plan.kv_bytes == 4_096_000
    assert plan.total_bytes == 7_000_000 + 4_096_000 + 300_000 + 450_000
    assert plan.least_bytes == 7_000_000 + MIN_CONTEXT * 1000 + 350_000
    assert plan.fits(plan.total_bytes) and not plan.fits(plan.total_bytes - 1)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_worker_with_what_the_plan_asks_for_gets_its_pool(device: str) -> None:
    plan = plan_of(device=device)
    beside = plan.total_bytes - plan.process_bytes - plan.weights_bytes
    assert plan.kv_tokens_beside(beside) == plan.num_kv_tokens
    assert plan.kv_tokens_beside(10 * beside) == plan.num_kv_tokens
    assert plan.kv_tokens_beside(beside - 1) < plan.num_kv_tokens
    assert plan.kv_tokens_beside(0) == 0


def test_the_suggested_context_fits_and_a_longer_one_does_not() -> None:
    plan = plan_of()
    most = plan.total_bytes
    assert plan.context_within(most) == 1024
    seen = set()
    for memory in range(most - plan.kv_bytes, most, 100_000):
        context = plan.context_within(memory)
        seen.add(context)
        assert context == 0 or context >= MIN_CONTEXT
        if context:
            assert plan_of(context=context).fits(memory)
            assert not plan_of(context=context + BLOCK_SIZE).fits(memory)
        else:
            assert not plan_of(context=MIN_CONTEXT).fits(memory)
    assert {0, MIN_CONTEXT} <= seen and len(seen) > 10


def test_the_context_is_the_models_unless_a_shorter_one_is_asked_for(
    checkpoint: Checkpoint,
) -> None:
    contexts = [
        plan_memory(checkpoint, float32(), context=asked).context for asked in (None, 100, 9999)
    ]
    assert contexts == [512, 100, 512]


def test_more_rows_a_step_and_more_exact_products_take_more(checkpoint: Checkpoint) -> None:
    for policy in (float32(), POLICIES["int8"]()):
        small, large = (
            plan_memory(checkpoint, policy, max_rows=rows).activation_bytes for rows in (64, 512)
        )
        assert small < large
    assert FINE.activation_bits == 16
    fine, coarse = (
        plan_memory(checkpoint, POLICIES[name]()).activation_bytes for name in ("fine", "int8")
    )
    assert fine > coarse


def test_other_families_are_planned_from_their_tensors(tmp_path: Path) -> None:
    tiny.save_model(tmp_path, "gpt_neox", tie_word_embeddings=False)
    checkpoint = open_checkpoint(tmp_path)
    with closing(checkpoint.weights):
        plan = plan_memory(checkpoint, choose_policy("cpu", "bfloat16"))
        packed = plan_memory(checkpoint, choose_policy("cpu", "bfloat16", load_8bit=True))
        infos = checkpoint.weights.tensors().values()
        num_weights = sum(math.prod(info.shape) for info in infos)
    assert (plan.weights_bytes, packed.weights_bytes) == (2 * num_weights, 2 * num_weights)
    assert plan.activation_bytes > 0 and plan.context == 512
