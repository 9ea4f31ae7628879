"""What a network looks like: `ModelConfig`, read from the content of a `config.json`. No weights.

Accepts the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
Source: configuration_llama.py and modeling_rope_utils.py of transformers 5.23.
"""

from __future__ import annotations

import math
import reprlib
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
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Well above every published model, low enough that no size overflows or is allocated in earnest.
_MAX_LAYERS = _MAX_HEADS = _MAX_HEAD_DIM = 4096
_MAX_WIDTH = 1 << 20
_MAX_VOCAB = 1 << 24
_MAX_TOKENS = 1 << 31


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
        refuse_quantized(config)
        model_type = reader.text("model_type", default="llama")
        heads = reader.count("num_attention_heads", most=_MAX_HEADS)
        hidden = reader.count("hidden_size", most=_MAX_WIDTH)
        kv_heads = reader.count("num_key_value_heads", default=heads, most=_MAX_HEADS)
        if heads % kv_heads:
            raise ModelLoadError(
                f"config.json: {heads} attention heads do not divide by "
                f"{kv_heads} key/value heads; the file is damaged"
            )
        activation = reader.text("hidden_act", default="silu")
        if activation not in _ACTIVATIONS:
            raise ModelLoadError(
                f"config.json: hidden_act {activation!r} is not of the Llama family (silu)"
            )
        num_layers = reader.count("num_hidden_layers", most=_MAX_LAYERS)
        attention_bias = reader.flag("attention_bias")
        head_dim = _head_dim(reader, hidden, heads)
        rope = _read_rope(config, reader, head_dim)
        return ModelConfig(
            model_type=model_type,
            vocab_size=reader.count("vocab_size", most=_MAX_VOCAB),
            hidden_size=hidden,
            intermediate_size=reader.count("intermediate_size", most=_MAX_WIDTH),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=reader.number("rms_norm_eps", default=1e-6, most=1.0),
            context_length=_context_length(reader, rope),
            rope=rope,
            is_tied=reader.flag("tie_word_embeddings"),
            has_qkv_bias=model_type == "qwen2" or attention_bias,
            has_output_bias=model_type in ("llama", "qwen3") and attention_bias,
            has_mlp_bias=reader.flag("mlp_bias"),
            has_qk_norm=model_type == "qwen3",
            sliding_windows=_sliding_windows(reader, model_type, num_layers),
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
    """Whether the native network can run this `config.json`; the fallback takes the others.

    Raises `ModelLoadError` naming a key of the wrong type.
    """
    reader = _Reader(config)
    names = architectures(config)
    model_type = reader.text("model_type", default="")
    if names:
        if not any(name in NATIVE_ARCHITECTURES for name in names):
            return False
    elif model_type not in _MODEL_TYPES:
        return False
    if reader.text("hidden_act", default="silu") not in _ACTIVATIONS:
        return False
    return _rope_kind(_rope_table(config)) in _ROPE_TYPES


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The class names under `architectures`, often none. Raises `ModelLoadError`."""
    names = config.get("architectures")
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _wrong("architectures", names, "a list of names")
    return names


def refuse_quantized(config: Mapping[str, Any]) -> None:
    """Raise `ModelLoadError` naming the method when the weights are packed by another tool."""
    settings = config.get("quantization_config")
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    shown = method if isinstance(method, str) and 0 < len(method) <= 40 else "an unnamed method"
    raise ModelLoadError(
        f"config.json: quantization_config says the weights are packed ({shown!r}), which "
        "chatserve does not read; take the original weights, with --load-8bit to save memory"
    )


def _rope_table(config: Mapping[str, Any]) -> Mapping[str, Any]:
    tables = [config.get(key) for key in ("rope_parameters", "rope_scaling")]
    for key, table in zip(("rope_parameters", "rope_scaling"), tables, strict=True):
        if table is not None and not isinstance(table, Mapping):
            raise _wrong(key, table, "an object")
    return tables[0] or tables[1] or {}


def _rope_kind(table: Mapping[str, Any]) -> str:
    reader = _Reader(table)
    return reader.text("rope_type", default=reader.text("type", default="default"))


def _head_dim(reader: _Reader, hidden: int, heads: int) -> int:
    if reader.table.get("head_dim") is None and hidden % heads:
        raise ModelLoadError(
            f"config.json: hidden_size {hidden} does not divide by {heads} attention heads"
        )
    head_dim = reader.count("head_dim", default=hidden // heads, most=_MAX_HEAD_DIM)
    if head_dim % 2 or head_dim < 4:
        raise ModelLoadError(
            f"config.json: head_dim is {head_dim}; rotary embedding needs an even number from 4"
        )
    return head_dim


def _read_rope(config: Mapping[str, Any], reader: _Reader, head_dim: int) -> RopeConfig:
    table = _rope_table(config)
    kind = _rope_kind(table)
    if kind not in _ROPE_TYPES:
        raise ModelLoadError(
            f"config.json: rope type {kind!r} is not one of {', '.join(sorted(_ROPE_TYPES))}"
        )
    scaling = _Reader(table)
    trained = reader.count("max_position_embeddings", default=2048, most=_MAX_TOKENS)
    theta = reader.number("rope_theta", default=10_000.0, least=1.0, most=1e12)
    rope = RopeConfig(
        theta=scaling.number("rope_theta", default=theta, least=1.0, most=1e12),
        kind=kind,  # type: ignore[arg-type]  # checked against _ROPE_TYPES above
        factor=scaling.number("factor", default=1.0, least=1.0, most=1e4),
        low_freq_factor=scaling.number("low_freq_factor", default=1.0, most=1e6),
        high_freq_factor=scaling.number("high_freq_factor", default=4.0, most=1e6),
        original_context=scaling.count(
            "original_max_position_embeddings", default=trained, most=_MAX_TOKENS
        ),
        factors=_rope_factors(table, head_dim) if kind == "factors" else (),
    )
    if kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise ModelLoadError(
            f"config.json: high_freq_factor {rope.high_freq_factor} is not above "
            f"low_freq_factor {rope.low_freq_factor}"
        )
    return rope


def _rope_factors(table: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    factors = table.get("factors")
    wanted = head_dim // 2
    if (
        not isinstance(factors, list)
        or len(factors) != wanted
        or not all(type(value) is float and 0 < value < math.inf for value in factors)
    ):
        raise _wrong("factors", factors, f"a list of {wanted} positive numbers")
    return tuple(factors)


def _context_length(reader: _Reader, rope: RopeConfig) -> int:
    """Tokens the model holds. Linear and dynamic scaling stretch max_position_embeddings.

    Vicuna v1.5-16k keeps max_position_embeddings 4096 beside a linear factor of 4.
    """
    length = reader.count("max_position_embeddings", default=2048, most=_MAX_TOKENS)
    if rope.kind in ("linear", "dynamic"):
        stretched = min(int(length * rope.factor), _MAX_TOKENS)
        longest = reader.count("max_sequence_length", default=stretched, most=_MAX_TOKENS)
        return min(stretched, longest)
    return length


def _sliding_windows(reader: _Reader, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    kinds = _layer_types(reader, num_layers)
    is_used = reader.flag("use_sliding_window")
    first = reader.count("max_window_layers", default=num_layers, least=0, most=_MAX_LAYERS)
    if reader.table.get("sliding_window") is None or model_type == "llama":
        return (None,) * num_layers
    window = reader.count("sliding_window", most=_MAX_TOKENS)
    if kinds:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if model_type == "mistral":
        return (window,) * num_layers
    if not is_used:
        return (None,) * num_layers
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _layer_types(reader: _Reader, num_layers: int) -> list[str]:
    """One of `_LAYER_TYPES` per layer, or nothing when the file has no such list."""
    kinds = reader.table.get("layer_types")
    if kinds is None:
        return []
    if (
        not isinstance(kinds, list)
        or len(kinds) != num_layers
        or not all(isinstance(kind, str) and kind in _LAYER_TYPES for kind in kinds)
    ):
        known = " or ".join(sorted(_LAYER_TYPES))
        raise _wrong("layer_types", kinds, f"a list of {num_layers} times {known}")
    return kinds


def _wrong(key: str, value: Any, wanted: str) -> ModelLoadError:
    # reprlib keeps the line short, whatever the file holds.
    return ModelLoadError(f"config.json: {key} is {reprlib.repr(value)}, not {wanted}")


class _Reader:
    """Typed access to a config with messages that name the key; null counts as absent."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self.table = table

    def count(self, key: str, default: int | None = None, *, most: int, least: int = 1) -> int:
        value = self.table.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelLoadError(f"config.json has no {key!r}; copy it from the model's repository")
        if type(value) is not int or not least <= value <= most:
            raise _wrong(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float, *, most: float, least: float = 0.0) -> float:
        """A positive number from `least` to `most`."""
        value = self.table.get(key)
        if value is None:
            return default
        # NaN fails every comparison; integers are compared before they could overflow a float.
        if type(value) not in (int, float) or not (value > 0 and least <= value <= most):
            raise _wrong(key, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.table.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise _wrong(key, value, "true or false")
        return value

    def text(self, key: str, *, default: str) -> str:
        value = self.table.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise _wrong(key, value, "a text")
        return value
