"""Rotary embedding of queries and keys, and keys and values into their slots of the KV pool.

Reference: `chatserve.models.rope.rotate` and the q/k norms of `chatserve.models.llama.Attention`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class HeadNorms(NamedTuple):
    """Weights (D,) of the norms over single heads (Qwen3) and their epsilon."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


@triton.jit
def _rope_store_kernel(
    qkv,
    positions,
    slots,
    cos_table,
    sin_table,
    keys,
    values,
    query_norm,
    key_norm,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    index = tl.arange(0, HALF_BLOCK)
    mask = index < HALF
    source = qkv + (row * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * HEAD_DIM + index
    low = tl.load(source, mask=mask, other=0.0)
    high = tl.load(source + HALF, mask=mask, other=0.0)
    slot = tl.load(slots + row).to(tl.int64)
    is_kept = mask & (slot >= 0)
    slot *= NUM_KV_HEADS * HEAD_DIM
    if head >= NUM_HEADS + NUM_KV_HEADS:
        target = values + slot + (head - NUM_HEADS - NUM_KV_HEADS) * HEAD_DIM + index
        tl.store(target, low, mask=is_kept)
        tl.store(target + HALF, high, mask=is_kept)
    else:
        first = low.to(tl.float32)
        second = high.to(tl.float32)
        is_key = head >= NUM_HEADS
        if HAS_NORM:
            square = tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)
            factor = 1.0 / tl.sqrt(square / HEAD_DIM + eps)
            weight = query_norm
            if is_key:
                weight = key_norm
            first *= factor * tl.load(weight + index, mask=mask, other=0.0).to(tl.float32)
            second *= factor * tl.load(weight + HALF + index, mask=mask, other=0.0).to(tl.float32)
        position = tl.load(positions + row).to(tl.int64) * HEAD_DIM
        cos = tl.load(cos_table + position + index, mask=mask, other=0.0).to(tl.float32)
        # the table's second half: its first half carries the minus sign of rotate_half
        sin = tl.load(sin_table + position + HALF + index, mask=mask, other=0.0).to(tl.float32)
        turned_low = (first * cos - second * sin).to(qkv.dtype.element_ty)
        turned_high = (second * cos + first * sin).to(qkv.dtype.element_ty)
        tl.store(source, turned_low, mask=mask)
        tl.store(source + HALF, turned_high, mask=mask)
        if is_key:
            target = keys + slot + (head - NUM_HEADS) * HEAD_DIM + index
            tl.store(target, turned_low, mask=is_kept)
            tl.store(target + HALF, turned_high, mask=is_kept)


def rope_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    pool: tuple[torch.Tensor, torch.Tensor],
    num_heads: int,
    norms: HeadNorms | None = None,
) -> None:
    """Rotate the queries and keys of qkv (N, H + 2K, D) in place; keys and values go to the pool.

    positions, slots: (N,) integers; slot -1 marks padding, which is not stored. tables: cos, sin
    (P, D) of `RotaryTable`, whose sine carries the sign of rotate_half. pool: keys, values
    (num_blocks, block_size, K, D) of one layer, in qkv's dtype. Mutates qkv and the pool.
    """
    num_rows, all_heads, head_dim = qkv.shape
    if not num_rows:
        return
    weights = norms if norms is not None else HeadNorms(qkv, qkv, 0.0)
    _rope_store_kernel[(num_rows, all_heads)](
        qkv,
        positions,
        slots,
        *tables,
        *pool,
        weights.query,
        weights.key,
        weights.eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=(all_heads - num_heads) // 2,
        HEAD_DIM=head_dim,
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        HAS_NORM=norms is not None,
        num_warps=1,
    )
