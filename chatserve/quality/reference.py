"""The network of the Llama family in float32, whose matrices pass by and are never held.

Judges the forms that serve. The same mathematics as `chatserve.models.llama`, but a product is
taken with some rows of a matrix at a time, as they come from disk. Knows no device and no packing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from chatserve.models.attention import attend
from chatserve.models.config import ModelConfig
from chatserve.models.rope import RotaryTable, rotate


class Rows(Protocol):
    """Tensors of one layer by their name in it, in the order in which they are asked for."""

    def slices(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows in float32) of a matrix, some at a time."""

    def vector(self, name: str) -> torch.Tensor:
        """A whole vector in float32."""

    def num_rows(self, name: str) -> int:
        """Rows of a matrix."""


@dataclass(frozen=True)
class Windows:
    """Which rows of the hidden states (T, hidden) belong together, and their angles."""

    lengths: Sequence[int]
    cos: torch.Tensor  # (longest, 1, D)
    sin: torch.Tensor

    @staticmethod
    def of(config: ModelConfig, lengths: Sequence[int]) -> Windows:
        longest = max(lengths)
        table = RotaryTable(config.rope, config.head_dim, torch.device("cpu"), torch.float32)
        return Windows(lengths, *table.at(torch.arange(longest), longest))

    def slices(self) -> Iterator[slice]:
        start = 0
        for length in self.lengths:
            yield slice(start, start + length)
            start += length


def run_layer(
    config: ModelConfig, index: int, x: torch.Tensor, rows: Rows, windows: Windows
) -> torch.Tensor:
    """Hidden states (T, hidden) after layer `index`; asks `rows` for each tensor once."""
    x = x + _attention(config, index, x, rows, windows)
    return x + _mlp(config, x, rows)


def _attention(
    config: ModelConfig, index: int, x: torch.Tensor, rows: Rows, windows: Windows
) -> torch.Tensor:
    x = F.rms_norm(x, x.shape[1:], rows.vector("input_layernorm.weight"), config.rms_norm_eps)
    heads = []
    for letter in "qkv":
        y = _product(x, rows, f"self_attn.{letter}_proj", has_bias=config.has_qkv_bias)
        heads.append(y.view(len(x), -1, config.head_dim))
    queries, keys, values = heads
    if config.has_qk_norm:
        size, eps = (config.head_dim,), config.rms_norm_eps
        queries = F.rms_norm(queries, size, rows.vector("self_attn.q_norm.weight"), eps)
        keys = F.rms_norm(keys, size, rows.vector("self_attn.k_norm.weight"), eps)
    mixed = torch.empty(len(x), config.num_heads * config.head_dim)
    for part in windows.slices():
        cos, sin = windows.cos[: part.stop - part.start], windows.sin[: part.stop - part.start]
        out = attend(
            rotate(queries[part], cos, sin).transpose(0, 1),
            rotate(keys[part], cos, sin).transpose(0, 1),
            values[part].transpose(0, 1),
            backend="plain",
            window=config.sliding_windows[index],
        )
        mixed[part] = out.transpose(0, 1).flatten(1)
    return _product(mixed, rows, "self_attn.o_proj", has_bias=config.has_output_bias)


def _mlp(config: ModelConfig, x: torch.Tensor, rows: Rows) -> torch.Tensor:
    norm = rows.vector("post_attention_layernorm.weight")
    x = F.rms_norm(x, x.shape[1:], norm, config.rms_norm_eps)
    inner = _product(x, rows, "mlp.gate_proj", has_bias=config.has_mlp_bias)
    F.silu(inner, inplace=True)
    bias = rows.vector("mlp.up_proj.bias") if config.has_mlp_bias else None
    for start, weight in rows.slices("mlp.up_proj.weight"):
        part = slice(start, start + len(weight))
        inner[:, part] *= F.linear(x, weight, None if bias is None else bias[part])
    return _product(inner, rows, "mlp.down_proj", has_bias=config.has_mlp_bias)


def _product(x: torch.Tensor, rows: Rows, name: str, *, has_bias: bool) -> torch.Tensor:
    y = torch.empty(len(x), rows.num_rows(f"{name}.weight"))
    for start, weight in rows.slices(f"{name}.weight"):
        y[:, start : start + len(weight)] = x @ weight.T
    return y + rows.vector(f"{name}.bias") if has_bias else y
