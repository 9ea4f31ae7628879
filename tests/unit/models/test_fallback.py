"""Causal models outside the Llama family run through transformers, behind the same interface."""

from __future__ import annotations

import weakref
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.errors import ModelLoadError
from chatserve.models import fallback as fallback_module
from chatserve.models.batch import Batch, Segment
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import DevicePolicy, choose_policy
from chatserve.models.fallback import load_fallback, read_hf_config
from chatserve.models.loader import load_model
from tests import tiny

FLOAT32 = choose_policy("cpu", "float32", load_8bit=False)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 16}),
    "moe": ("qwen3_moe", {"moe_intermediate_size": 32, "num_experts": 4, "head_dim": 16,
                          "num_experts_per_tok": 2}),
    "yarn": ("llama", {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
        "original_max_position_embeddings": 128}}),
}  # fmt: skip


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("load_8bit", "tolerance"), [(False, 1e-4), (True, 0.06)])
@torch.no_grad()
def test_logits_equal_transformers_in_prefill_step_by_step_and_batched(
    name: str, load_8bit: bool, tolerance: float
) -> None:
    model_type, changes = MODELS[name]
    hf_model = tiny.build_hf_model(model_type, **changes)
    policy = choose_policy("cpu", "float32", load_8bit=load_8bit)
    fallback = load_fallback(hf_model.config.to_dict(), state_of(hf_model), policy)
    ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(1))
    expected = hf_model(ids[None]).logits[0]
    pool = fallback.build_kv_pool(6, 16)
    first, second = (4, 1, 0), (2, 3)
    segments = [Segment(0, 20, 0, first), Segment(20, 30, 0, second)]
    both = Batch(
        [*ids[:20].tolist(), *ids[:30].tolist()], [*range(20), *range(30)], segments,
        [*range(20), 49],
    )  # fmt: skip
    parts = [fallback.forward(both, pool)]
    for index in range(20, 40):
        one = Batch([int(ids[index])], [index], [Segment(0, 1, index, first)], [0])
        parts.append(fallback.forward(one, pool))
    logits = torch.cat(parts)
    scale = expected.abs().max()
    assert (logits[:20] - expected[:20]).abs().max() < tolerance * scale
    assert (logits[20] - expected[29]).abs().max() < tolerance * scale
    assert (logits[21:] - expected[20:]).abs().max() < tolerance * scale


def test_half_precision_goes_as_8_bits_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a matrix is packed, those before it are gone, and the state that they came in, too."""
    hf_model = tiny.build_hf_model("gpt_neox")
    state, config = state_of(hf_model), hf_model.config.to_dict()
    before: list[weakref.ref[torch.Tensor]] = []
    real = fallback_module._PackedLinear.__init__

    def packed(self: Any, linear: torch.nn.Linear, policy: DevicePolicy) -> None:
        assert not state
        assert not any(weight() is not None for weight in before)
        before.append(weakref.ref(linear.weight))
        real(self, linear, policy)

    monkeypatch.setattr(fallback_module._PackedLinear, "__init__", packed)
    load_fallback(config, state, choose_policy("cpu", "float32", load_8bit=True))
    assert len(before) == 2 * 4 + 1  # of two layers, and the head


def test_a_step_without_sampled_rows_gives_no_logits() -> None:
    hf_model = tiny.build_hf_model("gpt2", **MODELS["gpt2"][1])
    fallback = load_fallback(hf_model.config.to_dict(), state_of(hf_model), FLOAT32)
    batch = Batch([0, 1, 2], [0, 1, 2], [Segment(0, 3, 0, (0,))], [])
    assert fallback.forward(batch, fallback.build_kv_pool(1, 16)).shape[0] == 0


def test_a_model_with_a_running_state_is_refused() -> None:
    hf_model = tiny.build_hf_model("mamba")
    with pytest.raises(ModelLoadError, match="running state"):
        load_fallback(hf_model.config.to_dict(), state_of(hf_model), FLOAT32)


@pytest.mark.parametrize("model_type", ["no-such-model", "bert_generation_x", "t5", None])
def test_an_unknown_architecture_is_refused_by_name(model_type: str | None) -> None:
    config = {"model_type": model_type, "architectures": ["FooForCausalLM"]}
    with pytest.raises(ModelLoadError, match="FooForCausalLM"):
        load_fallback(config, {}, FLOAT32)


def test_code_that_comes_with_a_model_is_never_run() -> None:
    config = {"model_type": "foo", "architectures": ["FooForCausalLM"],
              "auto_map": {"AutoModelForCausalLM": "modeling_foo.FooForCausalLM"}}  # fmt: skip
    with pytest.raises(ModelLoadError, match="never run"):
        load_fallback(config, {}, FLOAT32)


def test_a_folder_of_gpt2_is_read_whole(tmp_path: Path) -> None:
    """Its c_attn.bias is a weight; a bias right below attn is a mask of old files."""
    hf_model = tiny.save_model(tmp_path, "gpt2", **MODELS["gpt2"][1])
    checkpoint = open_checkpoint(tmp_path)
    with closing(checkpoint.weights):
        fallback = load_model(checkpoint, FLOAT32)
    ids = torch.arange(20)
    batch = Batch(ids.tolist(), list(range(20)), [Segment(0, 20, 0, (0, 1))], [19])
    logits = fallback.forward(batch, fallback.build_kv_pool(2, 16))
    with torch.no_grad():
        expected = hf_model(ids[None]).logits[0, -1:]
    assert torch.allclose(logits, expected, atol=1e-4)


def test_missing_weights_are_named() -> None:
    hf_model = tiny.build_hf_model("gpt2", **MODELS["gpt2"][1])
    state = state_of(hf_model)
    del state["transformer.h.1.mlp.c_fc.weight"]
    with pytest.raises(ModelLoadError, match=r"lack 1 tensors .*h\.1\.mlp\.c_fc\.weight"):
        load_fallback(hf_model.config.to_dict(), state, FLOAT32)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_implementation_named_by_the_model_is_not_fetched(key: str) -> None:
    value = "someone/some-kernel"
    plain = read_hf_config({"model_type": "gpt2", key: value, "auto_map": {"AutoConfig": "x"}})
    assert plain._attn_implementation is None
    assert not hasattr(plain, "auto_map")
    nested = read_hf_config({"model_type": "gemma3", "text_config": {key: value}})
    assert nested.get_text_config()._attn_implementation is None


def test_packed_weights_are_refused_by_method() -> None:
    config = {"model_type": "gpt2", "quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(ModelLoadError, match="gptq"):
        load_fallback(config, {}, FLOAT32)


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 10**9}, {"n_layer": "two"}, {"n_head": 0}, {"n_embd": [1]},
     {"get_text_config": 3}, {"n_head": 7}],
)  # fmt: skip
def test_what_transformers_cannot_compute_with_is_one_line(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load_fallback({"model_type": "gpt2", "n_embd": 64, **changes}, {}, FLOAT32)
    assert "\n" not in caught.value.message
