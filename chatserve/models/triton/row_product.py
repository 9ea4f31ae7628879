"""One row x W^T, bound by memory: W in half precision, or int8 codes with one scale per output row.

Reference: `F.linear`, and `chatserve.models.quantize.matmul_dequantise`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_OUTPUTS = 16
_DEPTH = 512


@triton.jit
def _row_kernel(
    x,
    weight,
    scales,
    out,
    num_outputs,
    NUM_COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < num_outputs
    place = weight + output.to(tl.int64)[:, None] * NUM_COLUMNS
    # one sum per thread and column until the end: the reduction across threads comes once
    sums = tl.zeros((OUTPUTS, DEPTH), tl.float32)
    for start in tl.range(0, NUM_COLUMNS, DEPTH, num_stages=3):
        column = start + tl.arange(0, DEPTH)
        is_column = column < NUM_COLUMNS
        tile = tl.load(
            place + column[None, :], mask=is_output[:, None] & is_column[None, :], other=0
        )
        values = tl.load(x + column, mask=is_column, other=0.0).to(tl.float32)
        sums += tile.to(tl.float32) * values[None, :]
    result = tl.sum(sums, axis=1)
    if HAS_SCALES:
        result *= tl.load(scales + output, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out + output, result.to(out.dtype.element_ty), mask=is_output)


def multiply_row(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, out: torch.Tensor
) -> None:
    """out (1, N) = x (1, K) times the transpose of weight (N, K), times scales (N,) if given.

    weight: int8 or any float dtype. Sums in float32.
    """
    num_outputs, num_columns = weight.shape
    _row_kernel[(triton.cdiv(num_outputs, _OUTPUTS),)](
        x,
        weight,
        out if scales is None else scales,
        out,
        num_outputs,
        NUM_COLUMNS=num_columns,
        OUTPUTS=_OUTPUTS,
        DEPTH=_DEPTH,
        HAS_SCALES=scales is not None,
        num_warps=4,
    )


def linear_row(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (1, K) times the transpose of weight (N, K), both of one float dtype -> (1, N)."""
    out = x.new_empty(1, weight.shape[0])
    multiply_row(x.contiguous(), weight, None, out)
    return out
