"""What goes into a benchmark model: the default model's weights, or random ones of a given shape.

All of them have the default model's tokenizer. Knows no file format.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from chatserve.hub import resolve_weights
from chatserve.models.checkpoint import Checkpoint, open_checkpoint

DEFAULT_MODEL = "smollm2-135m"
# layers, hidden, intermediate, heads, key/value heads, context, is the head tied
SHAPES = {
    "tiny": (2, 128, 256, 4, 2, 2048, True),
    "1.1b": (22, 2048, 5632, 32, 4, 2048, False),
    "7b": (32, 4096, 11008, 32, 32, 4096, False),
}
NOISE_VALUES = (1 << 24) + 41  # no multiple of a row: repeats do not line up
NOISE_SCALE = 0.02


class ModelSource(Protocol):
    """Weights by Hugging Face name, in bfloat16."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> torch.Tensor: ...


def default_model_path() -> Path:
    """The default model's GGUF file in chatserve's cache; never downloaded."""
    return resolve_weights(DEFAULT_MODEL, offline=True)


@contextmanager
def open_source(name: str) -> Iterator[ModelSource]:
    """`name`: the default model's, or one of `SHAPES`."""
    default = open_checkpoint(default_model_path())
    with closing(default.weights):
        if name == DEFAULT_MODEL:
            yield CheckpointSource(default)
        else:
            yield RandomSource(_random_config(name, default.config))


@dataclass(frozen=True)
class CheckpointSource:
    """An existing checkpoint, rounded to bfloat16."""

    checkpoint: Checkpoint

    @property
    def config(self) -> Mapping[str, Any]:
        return self.checkpoint.config

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.checkpoint.weights.tensors().items()}

    def read(self, name: str) -> torch.Tensor:
        return self.checkpoint.weights.read(name).to(torch.bfloat16)


class RandomSource:
    """A shape filled from one block of noise; a name always gets the same values."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.shapes = llama_shapes(config)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(NOISE_VALUES, generator=generator).mul_(NOISE_SCALE)
        self._noise = noise.to(torch.bfloat16)

    def read(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        num_values, start = math.prod(shape), zlib.crc32(name.encode()) % NOISE_VALUES
        repeats = -(-(start + num_values) // NOISE_VALUES)
        return self._noise.repeat(repeats)[start : start + num_values].view(shape)


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama with this `config.json`."""
    hidden, ffn, vocab = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": (hidden,), "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries), "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{part}.weight": shape for part, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _random_config(name: str, default: Mapping[str, Any]) -> dict[str, Any]:
    layers, hidden, ffn, heads, kv_heads, context, is_tied = SHAPES[name]
    return {
        **default,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": context,
        "rope_theta": 10000.0,
        "tie_word_embeddings": is_tied,
    }
