"""How a product of several rows is cut into programs and launched, and the sum of its parts.

Shared by the int8 and int4 kernels; knows no weight format.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

_WANTED_PROGRAMS = 264  # two for each multiprocessor of an H100
_MAX_SPLITS = 8
_SUM_BLOCK = 1024


class Tiles(NamedTuple):
    """One program's share: `rows` of x, `outputs` of the weight's rows, `depth` columns a turn.

    The columns are cut into `num_splits` parts, each summed by a program of its own.
    """

    rows: int
    outputs: int
    depth: int
    num_splits: int
    num_warps: int
    num_stages: int


def choose_tiles(num_rows: int, num_outputs: int, num_columns: int) -> Tiles:
    """Few rows read the weight once, as fast as memory gives it; many rows reuse each tile."""
    if num_rows <= 16:
        rows, outputs, depth, num_warps, num_stages = 16, 64, 128, 4, 4
    elif num_rows <= 64:
        rows, outputs, depth, num_warps, num_stages = 64, 64, 128, 4, 3
    else:
        rows, outputs, depth, num_warps, num_stages = 128, 128, 64, 8, 3
    programs = triton.cdiv(num_rows, rows) * triton.cdiv(num_outputs, outputs)
    wanted = triton.cdiv(_WANTED_PROGRAMS, programs) if num_rows <= 64 else 1
    num_splits = max(1, min(wanted, num_columns // (4 * depth), _MAX_SPLITS))
    return Tiles(rows, outputs, depth, num_splits, num_warps, num_stages)


def multiply_tiled(
    kernel: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    *,
    sum_scales: torch.Tensor | None = None,
) -> None:
    """out (M, N) = x (M, K) times the transpose of `weight`, in a format that `kernel` knows.

    sum_scales: (N,), where the kernel leaves them to the sum of a split product.
    """
    num_rows, num_columns = x.shape
    num_outputs = out.shape[1]
    tiles = choose_tiles(num_rows, num_outputs, num_columns)
    is_split = tiles.num_splits > 1
    target = out
    if is_split:
        target = out.new_empty(tiles.num_splits, num_rows, num_outputs, dtype=torch.float32)
    grid = (
        triton.cdiv(num_rows, tiles.rows),
        triton.cdiv(num_outputs, tiles.outputs),
        tiles.num_splits,
    )
    kernel[grid](
        x,
        weight,
        scales,
        target,
        num_rows,
        num_outputs,
        NUM_COLUMNS=num_columns,
        ROWS=tiles.rows,
        OUTPUTS=tiles.outputs,
        DEPTH=tiles.depth,
        NUM_SPLITS=tiles.num_splits,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if is_split:
        sum_parts(target, sum_scales, out)


@triton.jit
def _sum_kernel(
    parts,
    scales,
    out,
    size,
    width,
    NUM_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        total += tl.load(parts + split * size + index, mask=mask, other=0.0)
    if HAS_SCALES:
        total *= tl.load(scales + index % width, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=mask)


def sum_parts(parts: torch.Tensor, scales: torch.Tensor | None, out: torch.Tensor) -> None:
    """out (M, N) = sum of parts (S, M, N) float32 in their order, times scales (N,) if given."""
    num_splits, num_rows, width = parts.shape
    size = num_rows * width
    _sum_kernel[(triton.cdiv(size, _SUM_BLOCK),)](
        parts,
        out if scales is None else scales,
        out,
        size,
        width,
        NUM_SPLITS=num_splits,
        BLOCK=_SUM_BLOCK,
        HAS_SCALES=scales is not None,
    )
