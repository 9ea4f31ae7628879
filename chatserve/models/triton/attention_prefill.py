"""Causal attention of runs of rows over block tables: prefill, whole or in chunks.

The newest rows' keys and values are in the pool already; each tile of queries walks its sequence's
blocks from the first key that it may see to the last. Reference:
`chatserve.models.attention.attend`. Method: flash attention 2 (Dao 2023, arXiv 2307.08691).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from chatserve.models.triton.attention_tile import mix_tile, read_tile

QUERY_TILE = 64
_KEY_TILE = 64


class Run(NamedTuple):
    """Rows of one sequence in a flat batch; its block table is row `table_row` of the tables."""

    start: int
    num_tokens: int
    num_past: int
    table_row: int


# a width that varies from step to step must not be compiled in
@triton.jit(do_not_specialize=["table_stride"])
def _prefill_kernel(
    queries,
    keys,
    values,
    tables,
    tiles,
    out,
    scale,
    query_stride,
    table_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    tile_row = tiles + tl.program_id(0) * 4
    first_row = tl.load(tile_row).to(tl.int64)
    num_rows = tl.load(tile_row + 1)
    first_position = tl.load(tile_row + 2)
    table = tables + tl.load(tile_row + 3).to(tl.int64) * table_stride
    head = tl.program_id(1)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)

    query_index = tl.arange(0, QUERIES)
    dim = tl.arange(0, DIM_BLOCK)
    is_dim = dim < HEAD_DIM
    is_query = (query_index < num_rows)[:, None] & is_dim[None, :]
    query = tl.load(
        queries
        + (first_row + query_index)[:, None] * query_stride
        + head * HEAD_DIM
        + dim[None, :],
        mask=is_query,
        other=0.0,
    )
    position = first_position + query_index

    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(first_position - WINDOW + 1, 0)
    num_keys = first_position + num_rows

    maximum = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mix = tl.zeros((QUERIES, DIM_BLOCK), tl.float32)
    for tile in range(first_key // TILE, tl.cdiv(num_keys, TILE)):
        token = tile * TILE + tl.arange(0, TILE)
        is_there = token < num_keys
        key, value = read_tile(
            keys, values, table, kv_head, token, is_there, dim, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE
        )
        is_seen = (token[None, :] <= position[:, None]) & is_there[None, :]
        if WINDOW > 0:
            is_seen = is_seen & (token[None, :] > position[:, None] - WINDOW)
        maximum, total, mix = mix_tile(query, key, value, is_seen, scale, maximum, total, mix)

    # rows past the tile's end may have seen nothing; they are not stored
    total = tl.where(total == 0.0, 1.0, total)
    target = out + ((first_row + query_index)[:, None] * NUM_HEADS + head) * HEAD_DIM
    tl.store(target + dim[None, :], (mix / total[:, None]).to(out.dtype.element_ty), mask=is_query)


def tiles_of(runs: Sequence[Run]) -> list[tuple[int, int, int, int]]:
    """The programs' work: (first row, rows, position of the first, table row)."""
    return [
        (
            run.start + offset,
            min(QUERY_TILE, run.num_tokens - offset),
            run.num_past + offset,
            run.table_row,
        )
        for run in runs
        for offset in range(0, run.num_tokens, QUERY_TILE)
    ]


def attend_runs(
    queries: torch.Tensor,
    pool: tuple[torch.Tensor, torch.Tensor],
    tables: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    *,
    window: int | None = None,
) -> None:
    """Causal attention of the rows that `tiles` names; writes those rows of out (N, H * D).

    queries: (N, H, D), rows any stride apart. pool: keys, values (num_blocks, block_size, K, D),
    the runs' own included. tables: (S, max_blocks) int32. tiles: (T, 4) int32 from `tiles_of`.
    """
    keys, values = pool
    _, num_heads, head_dim = queries.shape
    _, block_size, num_kv_heads, _ = keys.shape
    if not len(tiles):
        return
    _prefill_kernel[(len(tiles), num_heads)](
        queries,
        keys,
        values,
        tables,
        tiles,
        out,
        head_dim**-0.5,
        queries.stride(0),
        tables.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        DIM_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=block_size,
        QUERIES=QUERY_TILE,
        TILE=_KEY_TILE,
        WINDOW=window or 0,
        num_warps=4,
        num_stages=2,
    )
