"""Attention of single rows over block tables: split over the keys, then reduced.

Every row reads the keys of its own sequence up to its own position, so a drafted run of several
rows of one sequence needs nothing special. Reference: `chatserve.models.attention.attend`.
Method: flash decoding (Dao et al. 2023) over block tables (Kwon et al. 2023, arXiv 2309.06180, §4).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chatserve.models.triton.attention_tile import mix_tile, read_tile

_TILE = 64  # tokens whose keys are read at once
_MAX_SPLITS = 16
_WANTED_PROGRAMS = 264  # two for each multiprocessor of an H100


# a width that varies from step to step must not be compiled in
@triton.jit(do_not_specialize=["table_stride"])
def _split_kernel(
    queries,
    keys,
    values,
    tables,
    table_rows,
    lengths,
    mixed,
    maxima,
    sums,
    scale,
    query_stride,
    table_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    length = tl.load(lengths + row)
    table = tables + tl.load(table_rows + row).to(tl.int64) * table_stride

    member = tl.arange(0, GROUP_BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    is_member = member < GROUP
    is_dim = dim < HEAD_DIM
    head = kv_head * GROUP + member
    query = tl.load(
        queries + row * query_stride + head[:, None] * HEAD_DIM + dim[None, :],
        mask=is_member[:, None] & is_dim[None, :],
        other=0.0,
    )

    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    first_tile = first // TILE
    num_tiles = tl.cdiv(length, TILE) - first_tile
    per_split = tl.cdiv(num_tiles, NUM_SPLITS)
    start = first_tile + split * per_split
    end = tl.minimum(start + per_split, first_tile + num_tiles)

    maximum = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    mix = tl.zeros((GROUP_BLOCK, DIM_BLOCK), tl.float32)
    for tile in range(start, end):
        token = tile * TILE + tl.arange(0, TILE)
        is_seen = (token < length) & (token >= first)
        key, value = read_tile(
            keys, values, table, kv_head, token, is_seen, dim, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE
        )
        maximum, total, mix = mix_tile(
            query, key, value, is_seen[None, :], scale, maximum, total, mix
        )

    # a row of padding has no tokens
    safe_total = tl.where(total == 0.0, 1.0, total)
    is_stored = is_member[:, None] & is_dim[None, :]
    if NUM_SPLITS == 1:
        target = mixed + (row * NUM_HEADS + head[:, None]) * HEAD_DIM + dim[None, :]
        tl.store(target, (mix / safe_total[:, None]).to(mixed.dtype.element_ty), mask=is_stored)
    else:
        part = (row * NUM_HEADS + head) * NUM_SPLITS + split
        tl.store(mixed + part[:, None] * HEAD_DIM + dim[None, :], mix, mask=is_stored)
        tl.store(maxima + part, maximum, mask=is_member)
        tl.store(sums + part, total, mask=is_member)


@triton.jit
def _reduce_kernel(
    mixed,
    maxima,
    sums,
    out,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)  # of all rows
    split = tl.arange(0, NUM_SPLITS)
    dim = tl.arange(0, DIM_BLOCK)
    is_dim = dim < HEAD_DIM
    part = head * NUM_SPLITS + split
    maximum = tl.load(maxima + part)
    largest = tl.max(maximum, axis=0)
    # a split without tokens has the maximum -inf: it weighs nothing; padding has no other splits
    weight = tl.exp(maximum - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weight * tl.load(sums + part), axis=0)
    total = tl.where(total == 0.0, 1.0, total)
    mix = tl.load(mixed + part[:, None] * HEAD_DIM + dim[None, :], mask=is_dim[None, :], other=0.0)
    result = tl.sum(mix * weight[:, None], axis=0) / total
    tl.store(out + head * HEAD_DIM + dim, result.to(out.dtype.element_ty), mask=is_dim)


def num_splits_for(num_rows: int, num_kv_heads: int, max_tokens: int) -> int:
    """A power of two that gives the device enough programs; fixed by sizes known before a step.

    max_tokens: the longest length that the rows may have.
    """
    wanted = triton.cdiv(_WANTED_PROGRAMS, num_rows * num_kv_heads)
    useful = triton.cdiv(max_tokens, _TILE)
    return int(triton.next_power_of_2(max(1, min(wanted, useful, _MAX_SPLITS))))


def attend_rows(
    queries: torch.Tensor,
    pool: tuple[torch.Tensor, torch.Tensor],
    tables: torch.Tensor,
    table_rows: torch.Tensor,
    lengths: torch.Tensor,
    *,
    num_splits: int,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of each row over the first `lengths[row]` tokens of its block table.

    queries: (N, H, D), rows any stride apart. pool: keys, values (num_blocks, block_size, K, D).
    tables: (S, max_blocks) int32 block ids; table_rows: (N,) int32, the row of `tables` that
    belongs to a row; lengths: (N,) int32, 0 for padding. Returns (N, H * D), zeros for padding.
    """
    keys, values = pool
    num_rows, num_heads, head_dim = queries.shape
    _, block_size, num_kv_heads, _ = keys.shape
    out = queries.new_empty(num_rows, num_heads * head_dim)
    if not num_rows:
        return out
    mixed, sums = out, out
    if num_splits > 1:
        parts = (num_rows, num_heads, num_splits)
        mixed = torch.empty(*parts, head_dim, device=queries.device, dtype=torch.float32)
        sums = torch.empty(2, *parts, device=queries.device, dtype=torch.float32)
    dim_block = max(16, triton.next_power_of_2(head_dim))
    _split_kernel[(num_rows, num_kv_heads, num_splits)](
        queries,
        keys,
        values,
        tables,
        table_rows,
        lengths,
        mixed,
        sums[0],
        sums[-1],
        head_dim**-0.5,
        queries.stride(0),
        tables.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        GROUP_BLOCK=max(16, triton.next_power_of_2(num_heads // num_kv_heads)),
        HEAD_DIM=head_dim,
        DIM_BLOCK=dim_block,
        BLOCK_SIZE=block_size,
        TILE=_TILE,
        NUM_SPLITS=num_splits,
        WINDOW=window or 0,
        num_warps=4,
        num_stages=3,
    )
    if num_splits > 1:
        _reduce_kernel[(num_rows * num_heads,)](
            mixed,
            sums[0],
            sums[1],
            out,
            HEAD_DIM=head_dim,
            DIM_BLOCK=dim_block,
            NUM_SPLITS=num_splits,
            num_warps=1,
        )
    return out
