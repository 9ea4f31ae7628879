"""x W^T over int8 codes with one scale per output row, dequantised inside the kernel.

One row is a product of vectors, bound by memory; more rows go through the tensor cores, the codes
converted in registers. Reference: `chatserve.models.quantize.matmul_dequantise`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chatserve.models.triton.matmul_tiles import multiply_tiled
from chatserve.models.triton.row_product import multiply_row


# the rows vary from step to step: they must not be compiled in
@triton.jit(do_not_specialize=["num_rows"])
def _tiled_kernel(
    x,
    codes,
    scales,
    out,
    num_rows,
    num_outputs,
    NUM_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    # programs that share a tile of the weight run side by side
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(2)
    is_row = row < num_rows
    is_output = output < num_outputs
    row_place = x + row.to(tl.int64)[:, None] * NUM_COLUMNS
    code_place = codes + output.to(tl.int64)[:, None] * NUM_COLUMNS
    SPAN: tl.constexpr = (NUM_COLUMNS + DEPTH * NUM_SPLITS - 1) // (DEPTH * NUM_SPLITS) * DEPTH
    first = split * SPAN
    # the weight is the left operand: it may stay in registers after its conversion
    sums = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for start in range(first, min(first + SPAN, NUM_COLUMNS), DEPTH):
        column = start + tl.arange(0, DEPTH)
        is_column = (column < NUM_COLUMNS)[None, :]
        weight = tl.load(code_place + column[None, :], mask=is_output[:, None] & is_column, other=0)
        values = tl.load(row_place + column[None, :], mask=is_row[:, None] & is_column, other=0.0)
        sums = tl.dot(weight.to(values.dtype), tl.trans(values), sums, input_precision="ieee")
    is_stored = is_output[:, None] & is_row[None, :]
    target = row.to(tl.int64)[None, :] * num_outputs + output[:, None]
    if NUM_SPLITS == 1:
        scale = tl.load(scales + output, mask=is_output, other=0.0).to(tl.float32)
        result = (sums * scale[:, None]).to(out.dtype.element_ty)
        tl.store(out + target, result, mask=is_stored)
    else:
        part = out + split.to(tl.int64) * num_rows * num_outputs
        tl.store(part + target, sums, mask=is_stored)


def matmul_int8(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x (M, K) times the transpose of codes (N, K) int8 * scales (N,) -> (M, N) in x's dtype.

    Sums in float32; codes are exact in every activation dtype and the scale comes last.
    """
    x = x.contiguous()
    num_rows = len(x)
    out = x.new_empty(num_rows, len(codes))
    if num_rows == 1:
        multiply_row(x, codes, scales, out)
    elif num_rows:
        multiply_tiled(_tiled_kernel, x, codes, scales, out, sum_scales=scales)
    return out
