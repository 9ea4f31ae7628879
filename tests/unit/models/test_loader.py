"""Checkpoints on disk become networks: equal logits, progress, faults by name."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatserve.errors import DoesNotFit, ModelLoadError, UsageError
from chatserve.models import loader, row_stream
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import DevicePolicy, choose_policy
from chatserve.models.fallback import FallbackModel
from chatserve.models.llama import Llama
from chatserve.models.loader import load_model
from chatserve.models.memory_plan import context_length, kv_bytes_per_token, plan_memory
from tests import networks, tiny

FLOAT32 = choose_policy("cpu", "float32", load_8bit=False)
IDS = torch.arange(5, 45)


def load(folder: Path, policy: DevicePolicy, **options: Any) -> Llama | FallbackModel:
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        return load_model(checkpoint, policy, **options)


@torch.no_grad()
def logits(folder: Path, **options: Any) -> torch.Tensor:
    policy = choose_policy("cpu", "float32", load_8bit=options.pop("load_8bit", False))
    model = load(folder, policy, **options)
    return networks.logits(model, IDS)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


def edit_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@torch.no_grad()
@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
@pytest.mark.parametrize(("load_8bit", "tolerance"), [(False, 1e-4), (True, 0.1)])
def test_a_loaded_folder_equals_transformers(
    tmp_path: Path, max_shard_size: str, load_8bit: bool, tolerance: float
) -> None:
    hf_model = tiny.save_model(tmp_path, max_shard_size=max_shard_size)
    expected = hf_model(IDS[None]).logits[0]
    error = (logits(tmp_path, load_8bit=load_8bit) - expected).abs().max()
    assert error < tolerance * expected.abs().max()


@pytest.mark.parametrize("load_8bit", [False, True])
def test_rows_read_a_few_at_a_time_give_the_same_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_8bit: bool
) -> None:
    tiny.save_model(tmp_path, "qwen2")  # with biases
    whole = logits(tmp_path, load_8bit=load_8bit)
    monkeypatch.setattr(row_stream, "SLICE_VALUES", 7 * 64)
    seen: list[tuple[int, int]] = []
    sliced = logits(
        tmp_path, load_8bit=load_8bit, progress=lambda done, total: seen.append((done, total))
    )
    assert sliced.equal(whole)
    assert seen == sorted(seen) and len(seen) > 200 and seen[-1][0] == seen[-1][1]


@torch.no_grad()
def test_a_2023_bin_folder_equals_transformers(tmp_path: Path) -> None:
    hf_model = tiny.save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {**hf_model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": IDS.float()}
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2],
              "pytorch_model-00002-of-00002.bin": names[1::2]}  # fmt: skip
    for file, part in shards.items():
        torch.save({name: state[name].half() for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index), "utf-8")
    expected = hf_model(IDS[None]).logits[0]
    assert (logits(tmp_path) - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_missing_head_means_tied(tmp_path: Path) -> None:
    tiny.save_model(tmp_path, tie_word_embeddings=True)
    edit_config(tmp_path, tie_word_embeddings=False)
    assert logits(tmp_path).shape == (len(IDS), tiny.VOCAB_SIZE)


def test_progress_counts_bytes_up_to_the_total(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    seen: list[tuple[int, int]] = []
    logits(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] > 100_000
    assert seen == sorted(seen)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelLoadError, match=r"lacks 1 of .*model\.layers\.1\.mlp\.up_proj"):
        logits(tmp_path)


def test_a_tensor_too_many_is_named(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    edit_config(tmp_path, num_hidden_layers=1)
    with pytest.raises(ModelLoadError, match=r"holds 9 tensors .*model\.layers\.1\."):
        logits(tmp_path)


def test_a_wrong_shape_names_both_shapes(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    edit_config(tmp_path, vocab_size=321)
    with pytest.raises(ModelLoadError, match=r"embed_tokens.*\(320, 64\).*\(321, 64\)"):
        logits(tmp_path)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    edit_config(tmp_path, architectures=["FooForCausalLM"], model_type="foo")
    with pytest.raises(ModelLoadError, match="FooForCausalLM"):
        logits(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_key_value_heads": 3}, "4 attention heads do not divide by 3"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None}, "does not divide"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
    ],
)
def test_a_bad_config_names_the_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tiny.save_model(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelLoadError, match=message):
        logits(tmp_path)


def test_a_claimed_70b_does_not_fit_and_names_need_have_and_way_out(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    edit_config(
        tmp_path, hidden_size=8192, num_hidden_layers=80, intermediate_size=28672,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, vocab_size=32000,
    )  # fmt: skip
    policy = choose_policy("cpu", "bfloat16", load_8bit=False)
    message = r"needs 138\.0 GB of weights in bfloat16 .* has [\d.]+ GB free; use a smaller model"
    with pytest.raises(DoesNotFit, match=message):
        load(tmp_path, policy)


def test_8_bits_are_named_as_the_way_out_when_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_model(tmp_path, hidden_size=512, intermediate_size=2048)
    monkeypatch.setattr(loader, "available_bytes", lambda device: 70_000_000)
    with pytest.raises(DoesNotFit, match=r"needs 0\.0 GB .*; use --load-8bit \(0\.0 GB\)"):
        load(tmp_path, FLOAT32)
    assert load(tmp_path, choose_policy("cpu", "float32", load_8bit=True))


@pytest.mark.parametrize(
    ("options", "form"),
    [({"load_4bit": True}, r"int4/32\+min/8"), ({"quant_group": "32"}, "int8/32")],
)
def test_other_families_do_not_become_8_bits_where_something_else_was_asked_for(
    options: dict[str, Any], form: str, tmp_path: Path
) -> None:
    tiny.save_model(tmp_path, "gpt_neox")
    asked = {"load_8bit": "load_4bit" not in options, **options}
    with pytest.raises(UsageError, match=f"only the Llama family's weights become {form},"):
        load(tmp_path, choose_policy("cpu", "float32", **asked))


def test_4_bits_are_named_where_8_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_model(tmp_path, hidden_size=512, intermediate_size=8192)
    checkpoint = open_checkpoint(tmp_path)
    with closing(checkpoint.weights):
        least = plan_memory(checkpoint, choose_policy("cpu", "float32", load_4bit=True)).least_bytes
    monkeypatch.setattr(loader, "available_bytes", lambda device: least)
    for policy in (FLOAT32, choose_policy("cpu", "float32", load_8bit=True)):
        with pytest.raises(DoesNotFit, match=r"use --load-4bit \(0\.0 GB\)"):
            load(tmp_path, policy)
    assert load(tmp_path, choose_policy("cpu", "float32", load_4bit=True))
    monkeypatch.setattr(loader, "available_bytes", lambda device: least - 1)
    with pytest.raises(DoesNotFit, match="use a smaller model"):
        load(tmp_path, FLOAT32)


def test_context_and_kv_size_of_native_and_other_models() -> None:
    llama = tiny.sizes(model_type="llama", architectures=["LlamaForCausalLM"])
    assert context_length(llama) == 512
    assert kv_bytes_per_token(llama, 2) == 2 * 2 * 2 * 16 * 2
    gpt2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 1024}
    assert context_length(gpt2) == 1024
    assert kv_bytes_per_token(gpt2, 2) == 2 * 12 * 768 * 2
    stretched = {**llama, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert context_length({**stretched, "max_sequence_length": 2048}) == 2048
    assert context_length(stretched) == 2048
