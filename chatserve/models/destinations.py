"""Names of a Llama-family checkpoint's tensors, and where in a network each goes.

Both networks (`llama`, `llama_kernels`) say what they are made of in the same words; the loader
streams tensors to the places found here. No files, no arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from chatserve.models.config import ModelConfig


class RowLoader(Protocol):
    """Anything with rows that arrive one checkpoint tensor at a time."""

    def load_rows(self, start: int, rows: torch.Tensor) -> None:
        """Store `rows` (n, ...) at `start`; converts dtype, device and packing."""
        ...


@runtime_checkable
class OpenRows(RowLoader, Protocol):
    """Rows that may be written to directly, in their own dtype."""

    def rows(self, start: int, count: int) -> torch.Tensor:
        """The memory of `count` rows from `start` on."""
        ...


@runtime_checkable
class PackedRows(RowLoader, Protocol):
    """Rows that take work to store."""

    def load_apart(self, start: int, rows: torch.Tensor) -> None:
        """`load_rows` on the caller's thread alone, while others store other rows."""
        ...


@dataclass(frozen=True)
class Destination:
    """Where a checkpoint tensor of `shape` goes: rows `start` and on of `target`."""

    target: RowLoader
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BlockTargets:
    """One block: q, k, v rows are fused, so are gate and up; None where the family has no such."""

    attention_norm: RowLoader
    qkv: RowLoader
    output: RowLoader
    mlp_norm: RowLoader
    gate_up: RowLoader
    down: RowLoader
    qkv_bias: RowLoader | None = None
    output_bias: RowLoader | None = None
    gate_up_bias: RowLoader | None = None
    down_bias: RowLoader | None = None
    query_norm: RowLoader | None = None
    key_norm: RowLoader | None = None


@dataclass(frozen=True)
class NetworkTargets:
    """A whole network; `embedding` and `head` are one where they are tied."""

    embedding: RowLoader
    head: RowLoader
    norm: RowLoader
    blocks: Sequence[BlockTargets]


def destinations(config: ModelConfig, network: NetworkTargets) -> Mapping[str, Destination]:
    """Every checkpoint tensor (Hugging Face names) and where it goes."""
    hidden, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
    table: dict[str, Destination] = {}

    def add(name: str, target: RowLoader | None, start: int, *shape: int) -> None:
        if target is not None:
            table[name] = Destination(target, start, shape)

    add("model.embed_tokens.weight", network.embedding, 0, config.vocab_size, hidden)
    if not config.is_tied:
        add("lm_head.weight", network.head, 0, config.vocab_size, hidden)
    add("model.norm.weight", network.norm, 0, hidden)
    for index, block in enumerate(network.blocks):
        prefix = f"model.layers.{index}."
        add(prefix + "input_layernorm.weight", block.attention_norm, 0, hidden)
        add(prefix + "post_attention_layernorm.weight", block.mlp_norm, 0, hidden)
        start = 0
        for letter, heads in zip(
            "qkv", (config.num_heads, config.num_kv_heads, config.num_kv_heads), strict=True
        ):
            name = f"{prefix}self_attn.{letter}_proj."
            add(name + "weight", block.qkv, start, heads * dim, hidden)
            add(name + "bias", block.qkv_bias, start, heads * dim)
            start += heads * dim
        name = prefix + "self_attn.o_proj."
        add(name + "weight", block.output, 0, hidden, config.num_heads * dim)
        add(name + "bias", block.output_bias, 0, hidden)
        add(prefix + "self_attn.q_norm.weight", block.query_norm, 0, dim)
        add(prefix + "self_attn.k_norm.weight", block.key_norm, 0, dim)
        for start, letter in ((0, "gate"), (ffn, "up")):
            name = f"{prefix}mlp.{letter}_proj."
            add(name + "weight", block.gate_up, start, ffn, hidden)
            add(name + "bias", block.gate_up_bias, start, ffn)
        add(prefix + "mlp.down_proj.weight", block.down, 0, hidden, ffn)
        add(prefix + "mlp.down_proj.bias", block.down_bias, 0, hidden)
    return table
