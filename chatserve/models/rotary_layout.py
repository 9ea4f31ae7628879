"""In which order the rows of query and key heads lie, told from the weights themselves.

Rotary embedding turns pairs of rows. Hugging Face keeps the two of a pair half a head apart, Meta's
own files and GGUF's `llama` as neighbours; a converter that moves the rows once too often or too
seldom makes a model that still writes words, and loses the thread. Slow pairs of a trained network
have long rows and fast ones short rows (Jin et al. 2025, arXiv 2502.01563), so the lengths along a
head tell the order. Knows no network and no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from chatserve.models.config import ModelConfig
from chatserve.models.weights import WeightSource

Layout = Literal["halves", "neighbours", "twice"]
"""`halves` is right; `neighbours` was never moved, `twice` was moved once more."""

_NUM_LAYERS = 8  # looked at, spread over the network
_NUM_HEADS = 4  # of each, the first ones
# Distances between rows of one quarter of a head and the next, in units of unrelated rows: 1.31 to
# 1.47 in SmolLM2's right order, 0.30 to 0.66 in the wrong ones, 1 for random weights.
_SUSPECT_DISTANCE = 0.85
_TRAINED_DISTANCE = 1.15


class RowOrder(NamedTuple):
    """How far apart rows are in length: those half a head apart, and a quarter."""

    half_distance: float
    quarter_distance: float

    @property
    def layout(self) -> Layout:
        """What the order looks like; random weights look right."""
        if not self.quarter_distance < _SUSPECT_DISTANCE:  # nor is NaN suspected
            return "halves"
        return "twice" if self.half_distance < _SUSPECT_DISTANCE else "neighbours"

    @property
    def is_trained(self) -> bool:
        """Whether there is any order at all."""
        return not _SUSPECT_DISTANCE <= self.quarter_distance <= _TRAINED_DISTANCE


def row_orders(weights: WeightSource, config: ModelConfig) -> tuple[RowOrder, RowOrder]:
    """Of queries and keys; reads some heads of some layers, a few megabytes of any model."""
    last = config.num_layers - 1
    steps = max(1, min(_NUM_LAYERS, config.num_layers) - 1)
    layers = sorted({round(step * last / steps) for step in range(steps + 1)})
    queries, keys = (
        _order([_row_lengths(weights, config, layer, letter) for layer in layers])
        for letter in ("q", "k")
    )
    return queries, keys


def put_right(rows: torch.Tensor, head_dim: int, layout: Layout) -> torch.Tensor:
    """Rows of whole heads (H * D, ...) in `layout` moved to halves."""
    if layout == "halves":
        return rows
    pairs = (head_dim // 2, 2) if layout == "neighbours" else (2, head_dim // 2)
    return rows.reshape(-1, *pairs, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _row_lengths(
    weights: WeightSource, config: ModelConfig, layer: int, letter: str
) -> torch.Tensor:
    """Logarithms of the rows' lengths (H, D), what scales a row behind the matrix included."""
    prefix = f"model.layers.{layer}.self_attn.{letter}"
    num_heads = min(_NUM_HEADS, config.num_heads if letter == "q" else config.num_kv_heads)
    rows = range(num_heads * config.head_dim)
    squares = weights.read(f"{prefix}_proj.weight", rows).float().square().sum(1)
    if config.has_qkv_bias:
        squares += weights.read(f"{prefix}_proj.bias").float()[: len(rows)].square()
    lengths = squares.clamp(min=1e-30).log().reshape(num_heads, -1) / 2
    if config.has_qk_norm:
        lengths += weights.read(f"{prefix}_norm.weight").float().abs().clamp(min=1e-15).log()
    return lengths - lengths.mean(1, keepdim=True)


def _order(lengths: Sequence[torch.Tensor]) -> RowOrder:
    by_layer = [(_distance(each, 2), _distance(each, 4)) for each in lengths]
    halves, quarters = zip(*by_layer, strict=True)
    return RowOrder(sum(halves) / len(halves), sum(quarters) / len(quarters))


def _distance(lengths: torch.Tensor, num_parts: int) -> float:
    """Mean square between rows of a part of each head (H, D) and the next; 1 if unrelated."""
    parts = lengths.reshape(lengths.shape[0], num_parts, -1)
    differences = parts[:, ::2] - parts[:, 1::2]
    spread = 2 * lengths.square().mean()
    return float(differences.square().mean() / spread) if spread > 0 else 1.0
