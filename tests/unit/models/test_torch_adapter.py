"""Adapters of rows on the plain network: PEFT's logits, the merged weights', row by row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.errors import ModelLoadError
from chatserve.models.adapter import Adapter, load_adapter
from chatserve.models.batch import Batch, NetworkAdapter, Segment
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.llama import Llama
from chatserve.models.loader import load_model
from chatserve.models.merge import merge
from tests import adapters, tiny

IDS = list(range(5, 45))
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
CASES: dict[str, dict[str, Any]] = {
    "q and v": {},
    "all": {"target_modules": ALL[:-1]},
    "all and the head": {"target_modules": ALL},
    "rslora": {"use_rslora": True, "target_modules": ("o_proj", "up_proj")},
    "one layer": {"layers_to_transform": [1], "target_modules": ("k_proj", "down_proj")},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "tiny"
    tiny.save_model(path, tokenizer=False)
    return path


def network(base: Path, paths: list[Path] | None = None, dtype: str = "float32") -> Llama:
    checkpoint = merge(open_checkpoint(base), paths or [])
    with closing(checkpoint.weights):
        model = load_model(checkpoint, choose_policy("cpu", dtype, load_8bit=False))
    assert isinstance(model, Llama)
    return model


@pytest.fixture(scope="module")
def plain(base: Path) -> Llama:
    return network(base)


@torch.no_grad()
def logits(model: Llama, *given: NetworkAdapter | None) -> Iterator[torch.Tensor]:
    """Of the same prompt with each of `given`, in one batch."""
    num_blocks = len(IDS) // 32 + 1
    pool = model.build_kv_pool(num_blocks * len(given), 32)
    segments = [
        Segment(i * len(IDS), len(IDS), 0, range(i * num_blocks, (i + 1) * num_blocks), adapter)
        for i, adapter in enumerate(given)
    ]
    positions = list(range(len(IDS))) * len(given)
    rows = range(len(positions))
    out = model.forward(Batch(IDS * len(given), positions, segments, rows), pool).float()
    return iter(out.split(len(IDS)))


def saved(base: Path, folder: Path, seed: int, **options: Any) -> tuple[Any, Path]:
    from transformers import AutoModelForCausalLM

    model = adapters.peft_model(AutoModelForCausalLM.from_pretrained(base), seed=seed, **options)
    adapters.save_peft(model, folder)
    return model, folder


@torch.no_grad()
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_logits_are_pefts_and_the_merged_weights(
    base: Path, plain: Llama, tmp_path: Path, options: dict[str, Any]
) -> None:
    judge, folder = saved(base, tmp_path / "one", 1, **options)
    _, other = saved(base, tmp_path / "two", 2)
    built = [plain.build_adapter(load_adapter(path, plain.config)) for path in (folder, other)]
    without, ours, theirs = logits(plain, None, *built)
    expected = judge(torch.tensor([IDS])).logits[0]
    assert (ours - expected).abs().max() < 1e-4
    [merged] = logits(network(base, [folder]), None)
    assert (ours - merged).abs().max() < 1e-4
    assert torch.equal(ours.argmax(1), merged.argmax(1))
    [alone] = logits(plain, None)
    # products of other shapes may round otherwise
    assert (without - alone).abs().max() < 1e-5
    for changed in (ours, theirs):
        assert (changed - without).abs().mean() > 0.01


@torch.no_grad()
def test_the_head_changes_the_wanted_rows(plain: Llama, tmp_path: Path) -> None:
    pairs = adapters.random_pairs({"lm_head": (320, 64)})
    folder = adapters.write(tmp_path / "a", pairs, target_modules=["lm_head"])
    adapter = plain.build_adapter(load_adapter(folder, plain.config))
    segments = [Segment(0, 20, 0, [0], adapter), Segment(20, 20, 0, [1])]
    ids, positions = IDS[:20] * 2, [*range(20)] * 2

    def run(rows: list[int]) -> torch.Tensor:
        return plain.forward(Batch(ids, positions, segments, rows), plain.build_kv_pool(2, 32))

    every = run([*range(40)])
    assert (every[19] - every[39]).abs().max() > 0.1
    for rows in ([19, 39], [5, 6, 25], [39], [3]):
        assert (run(rows) - every[rows]).abs().max() < 1e-5


@torch.no_grad()
def test_half_precision_is_as_near_as_its_merge(base: Path, plain: Llama, tmp_path: Path) -> None:
    pairs = adapters.random_pairs(adapters.tiny_shapes(ALL))
    folder = adapters.write(tmp_path / "a", pairs, target_modules=ALL[:-1])
    [exact] = logits(network(base, [folder]), None)
    [rounded] = logits(network(base, [folder], "bfloat16"), None)
    half = network(base, dtype="bfloat16")
    [ours] = logits(half, half.build_adapter(load_adapter(folder, half.config)))
    assert (ours - exact).abs().mean() < 1.5 * (rounded - exact).abs().mean()


def test_an_adapter_counts_its_bytes(plain: Llama, tmp_path: Path) -> None:
    adapter: Adapter = load_adapter(adapters.write(tmp_path / "a"), plain.config)
    assert plain.build_adapter(adapter).num_bytes == 2 * 4 * (64 + 64 + 32 + 64) * 4


def test_room_is_asked_for_before_anything_is_read(plain: Llama, tmp_path: Path) -> None:
    asked: list[int] = []

    def admit(num_values: int) -> None:
        asked.append(num_values)
        raise ModelLoadError("no room")

    folder = adapters.write(tmp_path / "a", {**adapters.random_pairs(adapters.tiny_shapes())})
    with pytest.raises(ModelLoadError, match="no room"):
        load_adapter(folder, plain.config, admit=admit)
    assert asked == [2 * 4 * (64 + 64 + 32 + 64)]
