"""RMSNorm, alone or after adding to the residual stream. Reference: `F.rms_norm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    values = tl.load(x + row * SIZE + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        place = residual + row * SIZE + column
        # rounded to the stream's dtype before it is normalised, as the reference does
        total = (values + tl.load(place, mask=mask, other=0.0).to(tl.float32)).to(
            residual.dtype.element_ty
        )
        tl.store(place, total, mask=mask)
        values = total.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / SIZE + eps)
    scale = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    result = (values * factor * scale).to(out.dtype.element_ty)
    tl.store(out + row * SIZE + column, result, mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over rows x (N, D), in float32; weight (D,)."""
    return _launch(x, None, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """residual += x, then its norm. x, residual: (N, D) contiguous. Mutates residual."""
    return _launch(x, residual, weight, eps)


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    num_rows, size = x.shape
    out = torch.empty_like(x)
    if num_rows:
        block = triton.next_power_of_2(size)
        _rms_norm_kernel[(num_rows,)](
            x,
            x if residual is None else residual,
            weight,
            out,
            eps,
            SIZE=size,
            BLOCK=block,
            HAS_RESIDUAL=residual is not None,
            num_warps=min(max(block // 512, 1), 16),
        )
    return out
