"""x W^T over 4-bit codes in groups of 32 columns, dequantised inside the kernel.

The format, and the reference: `chatserve.models.quantize.quantise_int4`, `dequantise_int4`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chatserve.models.triton.matmul_tiles import multiply_tiled

_VECTOR_OUTPUTS = 16
_VECTOR_BYTES = 256  # of a row at once


@triton.jit
def _vector_kernel(
    x,
    packed,
    scales,
    out,
    num_outputs,
    NUM_COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BYTES: tl.constexpr,
):
    ROW_BYTES: tl.constexpr = NUM_COLUMNS // 2
    GROUPS: tl.constexpr = BYTES // 16
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < num_outputs
    code_place = packed + output.to(tl.int64)[:, None] * ROW_BYTES
    scale_place = scales + output.to(tl.int64)[:, None] * (NUM_COLUMNS // 32)
    sums = tl.zeros((OUTPUTS, GROUPS), tl.float32)
    for start in tl.range(0, ROW_BYTES, BYTES, num_stages=3):
        byte = start + tl.arange(0, BYTES)
        is_byte = byte < ROW_BYTES
        group = start // 16 + tl.arange(0, GROUPS)
        is_group = is_output[:, None] & (group < NUM_COLUMNS // 32)[None, :]
        codes = tl.load(
            code_place + byte[None, :], mask=is_output[:, None] & is_byte[None, :], other=0
        )
        column = byte // 16 * 32 + byte % 16
        low = tl.load(x + column, mask=is_byte, other=0.0).to(tl.float32)
        high = tl.load(x + column + 16, mask=is_byte, other=0.0).to(tl.float32)
        products = ((codes & 15).to(tl.float32) - 8.0) * low[None, :]
        products += ((codes >> 4).to(tl.float32) - 8.0) * high[None, :]
        scale = tl.load(scale_place + group[None, :], mask=is_group, other=0.0).to(tl.float32)
        sums += tl.sum(tl.reshape(products, (OUTPUTS, GROUPS, 16)), axis=2) * scale
    result = tl.sum(sums, axis=1)
    tl.store(out + output, result.to(out.dtype.element_ty), mask=is_output)


# the rows vary from step to step: they must not be compiled in
@triton.jit(do_not_specialize=["num_rows"])
def _tiled_kernel(
    x,
    packed,
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
    ROW_BYTES: tl.constexpr = NUM_COLUMNS // 2
    BYTES: tl.constexpr = DEPTH // 2
    GROUPS: tl.constexpr = BYTES // 16
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(2)
    is_row = (row < num_rows)[:, None]
    is_output = (output < num_outputs)[:, None]
    row_place = x + row.to(tl.int64)[:, None] * NUM_COLUMNS
    code_place = packed + output.to(tl.int64)[:, None] * ROW_BYTES
    scale_place = scales + output.to(tl.int64)[:, None] * (NUM_COLUMNS // 32)
    SPAN: tl.constexpr = (ROW_BYTES + BYTES * NUM_SPLITS - 1) // (BYTES * NUM_SPLITS) * BYTES
    first = split * SPAN
    sums = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for start in range(first, min(first + SPAN, ROW_BYTES), BYTES):
        byte = start + tl.arange(0, BYTES)
        is_byte = (byte < ROW_BYTES)[None, :]
        group = start // 16 + tl.arange(0, GROUPS)
        codes = tl.load(code_place + byte[None, :], mask=is_output & is_byte, other=0)
        scale = tl.load(
            scale_place + group[None, :],
            mask=is_output & (group < NUM_COLUMNS // 32)[None, :],
            other=0.0,
        ).to(tl.float32)
        wide = tl.broadcast_to(scale[:, :, None], (OUTPUTS, GROUPS, 16))
        wide = tl.reshape(wide, (OUTPUTS, BYTES))
        column = (byte // 16 * 32 + byte % 16)[None, :]
        low = tl.load(row_place + column, mask=is_row & is_byte, other=0.0)
        high = tl.load(row_place + column + 16, mask=is_row & is_byte, other=0.0)
        weight = (((codes & 15).to(tl.float32) - 8.0) * wide).to(low.dtype)
        sums = tl.dot(weight, tl.trans(low), sums, input_precision="ieee")
        weight = (((codes >> 4).to(tl.float32) - 8.0) * wide).to(low.dtype)
        sums = tl.dot(weight, tl.trans(high), sums, input_precision="ieee")
    target = row.to(tl.int64)[None, :] * num_outputs + output[:, None]
    part = out + split.to(tl.int64) * num_rows * num_outputs
    tl.store(part + target, sums.to(out.dtype.element_ty), mask=is_output & tl.trans(is_row))


def matmul_int4(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x (M, K) times the transpose of a packed weight -> (M, N) in x's dtype; sums in float32.

    packed: (N, K/2) uint8; scales: (N, K/32) of any float dtype. With several rows a dequantised
    weight is rounded to x's dtype before the product.
    """
    x = x.contiguous()
    num_rows, num_columns = x.shape
    num_outputs = packed.shape[0]
    out = x.new_empty(num_rows, num_outputs)
    if num_rows == 1:
        _vector_kernel[(triton.cdiv(num_outputs, _VECTOR_OUTPUTS),)](
            x,
            packed,
            scales,
            out,
            num_outputs,
            NUM_COLUMNS=num_columns,
            OUTPUTS=_VECTOR_OUTPUTS,
            BYTES=_VECTOR_BYTES,
            num_warps=4,
        )
    elif num_rows:
        multiply_tiled(_tiled_kernel, x, packed, scales, out)
    return out
