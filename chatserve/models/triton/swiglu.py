"""silu(gate) * up over fused rows. Reference: `chatserve.models.llama.MLP`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _swiglu_kernel(both, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    gate = tl.load(both + row * 2 * size + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * size + size + column, mask=mask, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * size + column, result.to(out.dtype.element_ty), mask=mask)


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """both: (N, 2F) contiguous, gate then up. Returns (N, F)."""
    num_rows, width = both.shape
    size = width // 2
    out = both.new_empty(num_rows, size)
    if num_rows:
        _swiglu_kernel[(num_rows, triton.cdiv(size, _BLOCK))](both, out, size, BLOCK=_BLOCK)
    return out
