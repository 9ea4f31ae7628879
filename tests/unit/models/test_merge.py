"""A base and its adapters: PEFT's outputs, the two-stage merge, one rounding, no second copy."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chatserve.errors import ModelLoadError
from chatserve.models.adapter import LoraPair, load_adapter
from chatserve.models.checkpoint import Checkpoint, open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.form import native_config
from chatserve.models.loader import load_model
from chatserve.models.merge import MergedWeights, merge
from chatserve.models.packing import Packing
from chatserve.models.weights import TensorInfo
from tests import adapters, networks, tiny
from tests.unit.models import gguf_bytes

IDS = torch.arange(5, 45)
Q0 = "model.layers.0.self_attn.q_proj.weight"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "tiny"
    tiny.save_model(path, tokenizer=False)
    return path


@torch.no_grad()
def logits(checkpoint: Checkpoint, dtype: str = "float32", **options: Any) -> torch.Tensor:
    policy = choose_policy("cpu", dtype, **{"load_8bit": False, **options})
    with closing(checkpoint.weights):
        return networks.logits(load_model(checkpoint, policy), IDS).float()


def merged_logits(base: Path, paths: Sequence[Path], **options: Any) -> torch.Tensor:
    return logits(merge(open_checkpoint(base), paths), **options)


def read(checkpoint: Checkpoint, name: str, rows: range | None = None) -> torch.Tensor:
    with closing(checkpoint.weights):
        return checkpoint.weights.read(name, rows)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"target_modules": ALL}, {"use_rslora": True}])
def test_outputs_are_pefts_merged_and_unmerged(
    base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = adapters.peft_model(tiny.build_hf_model(), **options)
    adapters.save_peft(model, tmp_path)
    ours = merged_logits(base, [tmp_path])
    unmerged = model(IDS[None]).logits[0]
    without = logits(open_checkpoint(base))
    assert (unmerged - without).abs().max() > 0.1  # the adapter does something
    assert (ours - unmerged).abs().max() < 1e-3
    assert (ours - model.merge_and_unload()(IDS[None]).logits[0]).abs().max() < 1e-3


@torch.no_grad()
def test_two_stages_are_pefts_two_stages(base: Path, tmp_path: Path) -> None:
    """StackLLaMA: the RL adapter was trained on a base that the SFT adapter is merged into."""
    first = adapters.peft_model(tiny.build_hf_model(), seed=1)
    adapters.save_peft(first, tmp_path / "sft")
    second = adapters.peft_model(first.merge_and_unload(), seed=2, r=2)
    adapters.save_peft(second, tmp_path / "rl")
    ours = merged_logits(base, [tmp_path / "sft", tmp_path / "rl"])
    assert (ours - second(IDS[None]).logits[0]).abs().max() < 1e-3
    assert (ours - merged_logits(base, [tmp_path / "rl"])).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_merge_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny.save_model(tmp_path / "base", dtype=dtype, tokenizer=False)
    paths = [
        adapters.write(
            tmp_path / str(seed), adapters.random_pairs(adapters.tiny_shapes(), seed=seed)
        )
        for seed in (1, 2)
    ]
    expected = read(open_checkpoint(tmp_path / "base"), Q0).double()
    for path in paths:
        name_a, name_b = adapters.pair_names(Q0.removesuffix(".weight"))
        tensors = adapters.random_pairs(adapters.tiny_shapes(), seed=int(path.name))
        expected += 2 * tensors[name_b].double() @ tensors[name_a].double()
    checkpoint = merge(open_checkpoint(tmp_path / "base"), paths)
    info = checkpoint.weights.tensors()[Q0]
    assert info.dtype == torch.float32 and info.num_bytes == 64 * 64 * dtype.itemsize
    assert torch.allclose(read(checkpoint, Q0).double(), expected, rtol=0, atol=1e-6)


def test_rows_are_merged_alone_and_the_rest_is_left_alone(base: Path, tmp_path: Path) -> None:
    checkpoint = merge(open_checkpoint(base), [adapters.write(tmp_path / "a")])
    whole = read(checkpoint, Q0)
    parts = [
        read(merge(open_checkpoint(base), [tmp_path / "a"]), Q0, range(start, start + 16))
        for start in range(0, 64, 16)
    ]
    assert torch.allclose(torch.cat(parts), whole, rtol=0, atol=1e-6)
    for name in ("model.norm.weight", Q0.replace("q_proj", "k_proj")):
        plain = open_checkpoint(base)
        assert plain.weights.tensors()[name] == checkpoint.weights.tensors()[name]
        again = merge(open_checkpoint(base), [tmp_path / "a"])
        assert read(again, name).equal(read(plain, name))


def test_only_the_rows_asked_for_are_read(base: Path, tmp_path: Path) -> None:
    """So the loader's peak stays what it is: a few rows of one matrix."""
    asked: list[tuple[str, range | None]] = []

    class Spy:
        def __init__(self, weights: Any) -> None:
            self.weights = weights

        def tensors(self) -> Any:
            return self.weights.tensors()

        def read(self, name: str, rows: range | None = None) -> torch.Tensor:
            asked.append((name, rows))
            return self.weights.read(name, rows)

        def close(self) -> None:
            self.weights.close()

    checkpoint = open_checkpoint(base)
    adapter = load_adapter(adapters.write(tmp_path / "a"), native_config(checkpoint))
    with closing(MergedWeights(Spy(checkpoint.weights), [adapter])) as weights:
        assert weights.read(Q0, range(3, 5)).shape == (2, 64)
    assert asked == [(Q0, range(3, 5))]
    with pytest.raises(ValueError, match="closed file"):
        checkpoint.weights.read(Q0)


@pytest.mark.parametrize("options", [{"load_8bit": True}, {"load_4bit": True}])
def test_packed_weights_are_packed_after_the_merge(
    base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """As near to the merge in full precision as the packed base is to the base."""
    path = adapters.write(tmp_path / "a")
    full, full_base = merged_logits(base, [path]), logits(open_checkpoint(base))
    error = (merged_logits(base, [path], dtype="auto", **options) - full).abs().mean()
    usual = (logits(open_checkpoint(base), dtype="auto", **options) - full_base).abs().mean()
    assert error < 1.5 * usual < (full - full_base).abs().mean()


def gguf_base(folder: Path, tensors: dict[str, np.ndarray] | None = None) -> Path:
    tensors = gguf_bytes.model_tensors() if tensors is None else tensors
    return gguf_bytes.write_model(folder / "tiny.gguf", "llama", tensors)


GGUF_SHAPES = {
    f"model.layers.{layer}.self_attn.{letter}_proj": (rows, 8)
    for layer in (0, 1)
    for letter, rows in (("q", 8), ("v", 4))
}


def test_a_gguf_base_is_merged_in_the_layout_of_the_adapter(tmp_path: Path) -> None:
    """Its query rows lie in another order; read in the order that PEFT saw."""
    tensors = adapters.random_pairs(GGUF_SHAPES)
    path = adapters.write(tmp_path / "a", tensors)
    gguf = gguf_base(tmp_path)
    name_a, name_b = adapters.pair_names(Q0.removesuffix(".weight"))
    expected = read(open_checkpoint(gguf), Q0) + 2 * tensors[name_b] @ tensors[name_a]
    for rows in (None, range(3, 6)):
        ours = read(merge(open_checkpoint(gguf), [path]), Q0, rows)
        wanted = expected if rows is None else expected[3:6]
        assert torch.allclose(ours, wanted, rtol=0, atol=1e-6)


def test_a_merged_matrix_is_no_longer_in_the_files_form() -> None:
    """A loader that takes packed blocks as they are must not miss the adapter."""
    info = TensorInfo(Q0, (4, 8), "float32", 20, Packing(4, 32))

    class Packed:
        def tensors(self) -> dict[str, TensorInfo]:
            return {Q0: info, "model.norm.weight": info._replace(name="model.norm.weight")}

        def read(self, name: str, rows: range | None = None) -> torch.Tensor:
            raise AssertionError

        def close(self) -> None:
            raise AssertionError

    from chatserve.models.adapter import Adapter

    pair = LoraPair(torch.zeros(1, 8), torch.zeros(4, 1), 1.0)
    weights = MergedWeights(Packed(), [Adapter("a", Path("a"), "ad_0", {Q0: pair})])
    assert weights.tensors()[Q0].packing is None
    assert weights.tensors()["model.norm.weight"].packing == Packing(4, 32)


def test_without_adapters_nothing_changes(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    assert merge(checkpoint, []) is checkpoint
    checkpoint.weights.close()


def refused(checkpoint: Checkpoint, paths: Sequence[Path], reason: str) -> None:
    with closing(checkpoint.weights), pytest.raises(ModelLoadError, match=reason):
        merge(checkpoint, paths)


def test_an_adapter_is_never_added_twice(base: Path, tmp_path: Path) -> None:
    path = adapters.write(tmp_path / "a")
    same = shutil.copytree(path, tmp_path / "b")
    refused(open_checkpoint(base), [path, same], f"{same}: this adapter is in the weights already")
    once = merge(open_checkpoint(base), [path])
    refused(once, [same], "must not be added twice")


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    tiny.save_model(tmp_path, "phi", tokenizer=False)
    refused(open_checkpoint(tmp_path), [tmp_path], "Llama family, not to PhiForCausalLM")


def test_a_base_whose_files_contradict_its_config_is_refused(base: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(base)
    adapter = load_adapter(adapters.write(tmp_path / "a"), native_config(checkpoint))
    info = checkpoint.weights.tensors()[Q0]

    class Other:
        def __init__(self, info: TensorInfo | None) -> None:
            self.info = info

        def tensors(self) -> dict[str, TensorInfo]:
            return {Q0: self.info} if self.info else {}

        def read(self, name: str, rows: range | None = None) -> torch.Tensor:
            raise AssertionError

        def close(self) -> None:
            raise AssertionError

    for other, found in (
        (None, "missing"),
        (info._replace(shape=(64, 32)), r"shape \(64, 32\)"),
        (info._replace(dtype_name="int8"), "int8"),
    ):
        with pytest.raises(ModelLoadError, match=f"which is .*{found}"):
            MergedWeights(Other(other), [adapter])
    checkpoint.weights.close()


def warnings(base: Path, paths: Sequence[Path], caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        merge(open_checkpoint(base), paths).weights.close()
    return [record.message for record in caplog.records]


def test_an_rl_adapter_without_its_sft_adapter_is_noticed(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained_on = "trl-lib/llama-se-merged"
    sft = adapters.write(tmp_path / "sft", base_model_name_or_path="org/Tiny")
    rl = adapters.write(
        tmp_path / "rl", adapters.random_pairs(adapters.tiny_shapes(), seed=9),
        base_model_name_or_path=trained_on,
    )  # fmt: skip
    (told,) = warnings(base, [rl], caplog)
    assert repr(trained_on) in told
    assert f"--adapter LLAMA-7B-SE-PEFT --adapter {rl}" in told
    assert not warnings(base, [sft, rl], caplog)
    renamed = shutil.copytree(base, tmp_path / "llama-se-merged")
    assert not warnings(renamed, [rl], caplog)


def test_a_base_of_another_name_is_told(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = adapters.write(tmp_path / "a", base_model_name_or_path="lmsys/vicuna-7b-v1.5")
    (told,) = warnings(base, [path], caplog)
    assert "trained on 'lmsys/vicuna-7b-v1.5'" in told and str(base) in told
    cached = tmp_path / "models--lmsys--vicuna-7b-v1.5" / "snapshots" / "abc"
    shutil.copytree(base, cached)
    assert not warnings(cached, [path], caplog)
