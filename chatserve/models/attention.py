"""Attention over the keys and values in the pool: one signature, two backends. No scheduler.

`sdpa` is PyTorch's fused attention. `plain` is matmul, explicit mask and float32 softmax: the
reference, and the only one trusted on Metal, whose fused kernels have been silently wrong
(pytorch/pytorch issues 195910, 174861, 169222).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F

from chatserve.models.kv_pool import Placement, Span, TorchKVPool

AttentionBackend = Literal["sdpa", "plain"]
_Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


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
    layer: int,
    pool: TorchKVPool,
    placement: Placement,
    *,
    backend: AttentionBackend,
    window: int | None = None,
) -> torch.Tensor:
    """Store the batch's keys and values in the pool and attend, sequence by sequence.

    queries: (N, H, D); keys, values: (N, K, D) over all rows of the batch. Returns (N, H * D).
    """
    pool.store(layer, placement, keys, values)

    def attend_span(span: Span) -> torch.Tensor:
        rows = queries[span.rows]
        mixed = attend(
            rows.transpose(0, 1), *pool.read(layer, span), backend=backend, window=window
        )
        return mixed.transpose(0, 1).reshape(rows.shape[0], -1)

    mixed = [attend_span(span) for span in placement.spans]
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)
