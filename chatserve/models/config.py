"""What a network looks like: `ModelConfig`, read from the content of a `config.json`. No weights.

Accepts the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
Source: configuration_llama.py and modeling_rope_utils.py of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from chatserve.errors import ModelLoadError

RopeType = Literal["default", "linear", "dynamic", "llama3", "factors"]

NATIVE_ARCHITECTURES = (
    "LlamaForCausalLM",
    "LLaMAForCausalLM",  # the spelling of the first conversions, March 2023
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
_MODEL_TYPES = {"llama", "mistral", "qwen2", "qwen3"}
_ROPE_TYPES = {"default", "linear", "dynamic", "llama3", "factors"}
_ACTIVATIONS = {"silu", "swish"}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base, and how the frequencies are stretched beyond the trained context.

    `original_context` is the trained length in tokens. `factors` (head_dim/2 floats) divide the
    frequencies one by one; GGUF files of Llama 3 carry its scaling in this form.
    """

    theta: float = 10_000.0
    kind: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """A network of the Llama family.

    `sliding_windows` has one entry per layer: the number of tokens a query sees, None for all.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    context_length: int
    rope: RopeConfig
    is_tied: bool
    has_qkv_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    has_qk_norm: bool
    sliding_windows: tuple[int | None, ...]

    @staticmethod
    def from_hf(config: Mapping[str, Any]) -> ModelConfig:
        """Read the content of a `config.json`.

        Raises `ModelLoadError` naming the key that is missing, of the wrong type or out of range.
        """
        reader = _Reader(config)
        model_type = str(config.get("model_type", "llama"))
        heads = reader.count("num_attention_heads")
        hidden = reader.count("hidden_size")
        kv_heads = reader.count("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ModelLoadError(
                f"config.json: {heads} attention heads do not divide by "
                f"{kv_heads} key/value heads; the file is damaged"
            )
        if not config.get("head_dim") and hidden % heads:
            raise ModelLoadError(
                f"config.json: hidden_size {hidden} does not divide by {heads} attention heads"
            )
        activation = config.get("hidden_act", "silu")
        if activation not in _ACTIVATIONS:
            raise ModelLoadError(
                f"config.json: hidden_act {activation!r} is not of the Llama family (silu)"
            )
        num_layers = reader.count("num_hidden_layers")
        attention_bias = bool(config.get("attention_bias", False))
        rope = _read_rope(config, reader)
        return ModelConfig(
            model_type=model_type,
            vocab_size=reader.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=reader.count("intermediate_size"),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=reader.count("head_dim", default=hidden // heads),
            rms_norm_eps=reader.number("rms_norm_eps", default=1e-6),
            context_length=_context_length(config, reader, rope),
            rope=rope,
            is_tied=bool(config.get("tie_word_embeddings", False)),
            has_qkv_bias=model_type == "qwen2" or attention_bias,
            has_output_bias=model_type in ("llama", "qwen3") and attention_bias,
            has_mlp_bias=bool(config.get("mlp_bias", False)),
            has_qk_norm=model_type == "qwen3",
            sliding_windows=_sliding_windows(config, model_type, num_layers),
        )

    @property
    def num_parameters(self) -> int:
        """All weights, a tied head counted once."""
        qkv_rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        attention = (qkv_rows + self.num_heads * self.head_dim) * self.hidden_size
        mlp = 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.is_tied else 2)
        norms = (2 * self.num_layers + 1) * self.hidden_size
        if self.has_qk_norm:
            norms += 2 * self.num_layers * self.head_dim
        biases = self.num_layers * (
            qkv_rows * self.has_qkv_bias
            + self.hidden_size * self.has_output_bias
            + (2 * self.intermediate_size + self.hidden_size) * self.has_mlp_bias
        )
        return embeddings + self.num_layers * (attention + mlp) + norms + biases

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether the native network can run this `config.json`; the fallback takes the others."""
    architectures = config.get("architectures") or []
    if architectures:
        if not any(name in NATIVE_ARCHITECTURES for name in architectures):
            return False
    elif config.get("model_type") not in _MODEL_TYPES:
        return False
    if config.get("hidden_act", "silu") not in _ACTIVATIONS:
        return False
    return _rope_kind(_rope_table(config)) in _ROPE_TYPES


def _rope_table(config: Mapping[str, Any]) -> Mapping[str, Any]:
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return table if isinstance(table, Mapping) else {}


def _rope_kind(table: Mapping[str, Any]) -> str:
    return str(table.get("rope_type") or table.get("type") or "default")


def _read_rope(config: Mapping[str, Any], reader: _Reader) -> RopeConfig:
    table = _rope_table(config)
    kind = _rope_kind(table)
    if kind not in _ROPE_TYPES:
        raise ModelLoadError(
            f"config.json: rope type {kind!r} is not one of {', '.join(sorted(_ROPE_TYPES))}"
        )
    scaling = _Reader(table)
    trained = reader.count("max_position_embeddings", default=2048)
    return RopeConfig(
        theta=scaling.number("rope_theta", default=reader.number("rope_theta", default=10_000.0)),
        kind=kind,  # type: ignore[arg-type]  # checked against _ROPE_TYPES above
        factor=scaling.number("factor", default=1.0),
        low_freq_factor=scaling.number("low_freq_factor", default=1.0),
        high_freq_factor=scaling.number("high_freq_factor", default=4.0),
        original_context=scaling.count("original_max_position_embeddings", default=trained),
        factors=tuple(float(value) for value in table.get("factors", ())),
    )


def _context_length(config: Mapping[str, Any], reader: _Reader, rope: RopeConfig) -> int:
    """Tokens the model holds. Linear and dynamic scaling stretch max_position_embeddings.

    Vicuna v1.5-16k keeps max_position_embeddings 4096 beside a linear factor of 4.
    """
    length = reader.count("max_position_embeddings", default=2048)
    if rope.kind in ("linear", "dynamic"):
        stretched = int(length * rope.factor)
        return min(stretched, reader.count("max_sequence_length", default=stretched))
    return length


def _sliding_windows(
    config: Mapping[str, Any], model_type: str, num_layers: int
) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if not window or model_type == "llama":
        return (None,) * num_layers
    kinds = config.get("layer_types")
    if kinds and len(kinds) == num_layers:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if model_type == "mistral":
        return (window,) * num_layers
    if not config.get("use_sliding_window", False):
        return (None,) * num_layers
    first = config.get("max_window_layers", num_layers)
    return tuple(window if layer >= first else None for layer in range(num_layers))


class _Reader:
    """Typed access to a config with messages that name the key."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self.table = table

    def count(self, key: str, default: int | None = None) -> int:
        value = self.table.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelLoadError(f"config.json has no {key!r}; copy it from the model's repository")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise ModelLoadError(f"config.json: {key} is {value!r}, not a positive whole number")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.table.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ModelLoadError(f"config.json: {key} is {value!r}, not a positive number")
        return float(value)
