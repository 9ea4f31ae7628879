"""Whatever a config.json holds, it is read or refused with the key's name."""

from __future__ import annotations

import time
from typing import Any

import pytest

from chatserve.errors import ModelLoadError
from chatserve.models.config import ModelConfig, is_native
from chatserve.models.fallback import read_hf_config
from chatserve.models.memory_plan import context_length, kv_bytes_per_token
from tests import tiny

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
VALUES: list[Any] = [
    None, True, -1, 0, 1.5, "x", [], {}, [1], {"a": 1}, 10**400, float("nan"), float("inf"),
    2**31 - 1, ["x"], {"rope_type": "llama3", "factor": "x"},
]  # fmt: skip
OPTIONAL = {
    "head_dim": 16, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 32,
    "max_window_layers": 1, "use_sliding_window": True, "attention_bias": False, "mlp_bias": False,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_sequence_length": 256,
    "quantization_config": None, "rope_parameters": None,
    "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
}  # fmt: skip


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": family,
        "architectures": [ARCHITECTURES[family]],
        **tiny.sizes(),
        **OPTIONAL,
        **changes,
    }


def read_everything(config: dict[str, Any]) -> None:
    """Read it by every door; a `ModelLoadError` of one line is an answer, all else fails."""
    doors = (
        is_native,
        ModelConfig.from_hf,
        context_length,
        lambda config: kv_bytes_per_token(config, 2),
    )
    for door in doors:
        try:
            door(config)
        except ModelLoadError as error:
            assert "\n" not in error.message and len(error.message) < 600


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_any_value_of_any_key_is_read_or_refused(family: str) -> None:
    read_hf_config({"model_type": "gpt2"})  # imports transformers before the clock starts
    for key in config_of(family):
        for value in VALUES:
            start = time.process_time()
            read_everything(config_of(family, **{key: value}))
            assert time.process_time() - start < 2, (key, value)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "factors", "default"])
@pytest.mark.parametrize(
    "key",
    ["rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "rope_theta",
     "original_max_position_embeddings", "factors"],
)  # fmt: skip
def test_any_value_in_the_rope_table_is_read_or_refused(kind: str, key: str) -> None:
    for value in VALUES:
        table = {"rope_type": kind, "factor": 2.0, "factors": [1.0] * 8, key: value}
        read_everything(config_of("llama", rope_scaling=table))


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "gemma3", "qwen3_moe"])
def test_any_value_for_transformers_is_read_or_refused(model_type: str) -> None:
    keys = ["num_hidden_layers", "num_attention_heads", "hidden_size", "n_head", "n_layer",
            "layer_types", "text_config", "rope_parameters", "get_text_config", "torch_dtype",
            "max_position_embeddings", "id2label", "num_labels", "architectures"]  # fmt: skip
    for key in keys:
        for value in VALUES:
            read_everything({"model_type": model_type, "vocab_size": 320, key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": 2}, "rms_norm_eps is 2, not a number from 0 to 1"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"rope_scaling": {"type": "linear", "factor": 1e5}}, r"factor is 100000\.0"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, r"factor is 0\.5"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', not an object"),
        ({"rope_scaling": {"type": 3}}, "type is 3, not a text"),
        ({"rope_scaling": {"type": "factors"}}, "factors is None, not a list of 8"),
        ({"rope_scaling": {"type": "factors", "factors": [1.0]}}, "factors is .* list of 8"),
        ({"rope_scaling": {"type": "factors", "factors": [0.0] * 8}}, "factors is"),
        (
            {"rope_scaling": {"type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor 4.0 is not above",
        ),
        ({"num_hidden_layers": 4097}, "num_hidden_layers is 4097"),
        ({"num_attention_heads": 8192}, "num_attention_heads is 8192"),
        ({"head_dim": 15}, "head_dim is 15; rotary"),
        ({"head_dim": 4098}, "head_dim is 4098"),
        ({"vocab_size": 2**24 + 1}, "vocab_size is"),
        ({"hidden_size": 2**20 + 4}, "hidden_size is"),
        ({"intermediate_size": 2**20 + 1}, "intermediate_size is"),
        ({"max_position_embeddings": 2**31 + 1}, "max_position_embeddings is"),
        ({"sliding_window": "32"}, "sliding_window is '32'"),
        ({"max_window_layers": -1}, "max_window_layers is -1"),
        ({"layer_types": ["full_attention"]}, "layer_types is .* a list of 2 times full"),
        ({"layer_types": ["full_attention", "mamba"]}, "layer_types is"),
        ({"architectures": "MistralForCausalLM"}, "architectures is 'Mist.* a list of names"),
        ({"architectures": [1]}, "architectures is"),
        ({"model_type": 3}, "model_type is 3"),
        ({"hidden_act": ["silu"]}, "hidden_act is"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', not true or false"),
        ({"attention_bias": 1}, "attention_bias is 1"),
        ({"mlp_bias": "no"}, "mlp_bias is"),
        ({"use_sliding_window": 0}, "use_sliding_window is 0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'.*original.*--load-8bit"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "'fp8'"),
        ({"quantization_config": {"load_in_4bit": True}}, "an unnamed method"),
    ],
)
def test_the_refusal_names_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        config = config_of("mistral", **changes)
        is_native(config)
        ModelConfig.from_hf(config)


def test_layer_types_and_windows() -> None:
    assert ModelConfig.from_hf(config_of("mistral")).sliding_windows == (None, 32)
    plain = config_of("mistral", layer_types=None)
    assert ModelConfig.from_hf(plain).sliding_windows == (32, 32)
    assert ModelConfig.from_hf({**plain, "model_type": "qwen3"}).sliding_windows == (None, 32)
    everywhere = {**plain, "model_type": "qwen3", "max_window_layers": 0}
    assert ModelConfig.from_hf(everywhere).sliding_windows == (32, 32)


def test_stretching_stops_at_the_largest_context() -> None:
    config = config_of(
        "llama", max_position_embeddings=2**31, max_sequence_length=None,
        rope_scaling={"type": "linear", "factor": 1e4},
    )  # fmt: skip
    assert context_length(config) == 2**31
