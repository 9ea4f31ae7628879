"""Attention over one sequence's cached keys and values: one signature, two backends. No scheduler.

`sdpa` is PyTorch's fused attention. `plain` is matmul, explicit mask and float32 softmax: the
reference, and the only one trusted on Metal, whose fused kernels have been silently wrong
(pytorch/pytorch issues 195910, 174861, 169222).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F

AttentionBackend = Literal["sdpa", "plain"]
_Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class SequenceCache(Protocol):
    """Keys and values of one sequence in all layers. The engine implements it."""

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys, values (K, T, D) of the newest T tokens; returns all so far, (K, S, D)."""
        ...


@dataclass(frozen=True)
class Segment:
    """The rows of one sequence in a flat batch.

    `start` and `num_tokens` are rows of the batch; `num_past` tokens are in the cache already.
    """

    start: int
    num_tokens: int
    num_past: int
    cache: SequenceCache

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.num_tokens)

    @property
    def num_total(self) -> int:
        return self.num_past + self.num_tokens


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    backend: AttentionBackend,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention of one sequence's newest T tokens over its S cached ones.

    queries: (H, T, D); keys, values: (K, S, D) with H a multiple of K and S ≥ T; `window` limits
    each query to the newest `window` tokens, itself included. Returns (H, T, D).
    """
    num_kv_heads, num_total, head_dim = keys.shape
    num_heads, num_queries, _ = queries.shape
    if window is not None and num_queries == 1 and num_total > window:
        keys, values, num_total = keys[:, -window:], values[:, -window:], window
    if num_queries == 1:
        # every query head of a group sees the same keys: the group takes the place of the queries
        grouped = queries.reshape(num_kv_heads, num_heads // num_kv_heads, head_dim)
        mixed = _BACKENDS[backend](grouped, keys, values, None)
        return mixed.reshape(num_heads, 1, head_dim)
    mask = causal_mask(num_queries, num_total, window, queries.device)
    groups = num_heads // num_kv_heads
    if groups > 1:
        keys = keys.repeat_interleave(groups, dim=0)
        values = values.repeat_interleave(groups, dim=0)
    return _BACKENDS[backend](queries, keys, values, mask)


def causal_mask(
    num_queries: int, num_total: int, window: int | None, device: torch.device
) -> torch.Tensor:
    """(T, S) bool, True where the query may look: the newest token is the last column."""
    last = torch.arange(num_total - num_queries, num_total, device=device)[:, None]
    column = torch.arange(num_total, device=device)[None, :]
    mask = column <= last
    if window is not None:
        mask &= column > last - window
    return mask


def _sdpa(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    mixed: torch.Tensor = F.scaled_dot_product_attention(
        queries[None], keys[None], values[None], attn_mask=mask
    )
    return mixed[0]


def _plain(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    scores = ((queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)).float()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1).to(values.dtype)
    return torch.matmul(weights, values)


_BACKENDS: Mapping[AttentionBackend, _Backend] = {"sdpa": _sdpa, "plain": _plain}


def attend_batch(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    segments: Sequence[Segment],
    layer: int,
    *,
    backend: AttentionBackend,
    window: int | None = None,
) -> torch.Tensor:
    """Store the batch's keys and values in each sequence's cache and attend, sequence by sequence.

    queries: (N, H, D); keys, values: (N, K, D) over all rows of the batch. Returns (N, H * D).
    """
    if len(segments) == 1:
        return _attend_segment(queries, keys, values, segments[0], layer, backend, window)
    return torch.cat(
        [
            _attend_segment(
                queries[item.rows], keys[item.rows], values[item.rows], item, layer, backend, window
            )
            for item in segments
        ]
    )


def _attend_segment(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    segment: Segment,
    layer: int,
    backend: AttentionBackend,
    window: int | None,
) -> torch.Tensor:
    all_keys, all_values = segment.cache.append(layer, keys.transpose(0, 1), values.transpose(0, 1))
    mixed = attend(queries.transpose(0, 1), all_keys, all_values, backend=backend, window=window)
    return mixed.transpose(0, 1).reshape(queries.shape[0], -1)
