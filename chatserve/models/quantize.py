"""Weight-only int8 and int4: packed codes and their scales. No family names, no files.

A weight row w becomes codes q (int8, -127..127) and a scale s with w ≈ q * s. The scale is rounded
*up* to the activation dtype before the codes are taken, so no code clips and the error of a weight
is at most s / 2: the row's maximum / 254, plus the scale's rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F

from chatserve.models.packing import GROUP

Int8Backend = Literal["cpu", "int8pack", "triton", "dequantise", "bitsandbytes"]
Int8Matmul = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_ROWS_AT_ONCE = 1024  # rows whose float copy exists at one moment
_TILE = 32  # rows and columns that PyTorch's operator takes at once
INT8PACK_MAX_ROWS_CPU = 8
"""Above so many activation rows PyTorch's CPU operator loses to dequantising in slices."""
TRITON_MAX_ROWS = 1024
"""From here on a product costs more than dequantising, which then lets cuBLAS do it. Estimated."""


def quantise_rows(
    weight: torch.Tensor, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, K) int8 and scales (N,) `scale_dtype` of a weight (N, K) of any float dtype.

    Works in slices of rows, so that the float32 copy stays small. An all-zero row has scale 0.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=scale_dtype, device=weight.device)
    for start in range(0, weight.shape[0], _ROWS_AT_ONCE):
        rows = weight[start : start + _ROWS_AT_ONCE].float()
        scale = _round_up(rows.abs().amax(dim=1) / 127, scale_dtype)
        divisor = torch.where(scale > 0, scale.float(), 1.0)
        rows = rows / divisor[:, None]
        codes[start : start + _ROWS_AT_ONCE] = rows.round_().clamp_(-127, 127)
        scales[start : start + _ROWS_AT_ONCE] = scale
    return codes, scales


def _round_up(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The smallest numbers of `dtype` that are not below `values` (float32, not negative)."""
    rounded = values.to(dtype)
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.float() < values, above, rounded)


def quantise_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes (N, K/2) uint8 and scales (N, K/32) float16 of a weight (N, K), K % 32 == 0.

    A group of 32 weights is 16 bytes: byte j holds the code of column j in its low nibble and that
    of column 16 + j in its high one, as in a Q4_0 block of GGUF. A weight is (code - 8) * scale.
    The entry of largest magnitude gets code 0 (that is -8), so its own sign decides the scale's
    and all sixteen codes are used. An all-zero group has scale 0.
    """
    groups = weight.float().reshape(weight.shape[0], -1, GROUP)  # (N, K/32, 32)
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scales = (largest / -8).half()
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales.float())
    codes = (groups * inverse + 8).round_().clamp_(0, 15).to(torch.uint8)
    packed = codes[..., :16] | codes[..., 16:] << 4
    return packed.flatten(1), scales[..., 0]


def dequantise_int4(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight (N, K) float32 of packed codes (N, K/2) and scales (N, K/32)."""
    groups = packed.reshape(packed.shape[0], -1, GROUP // 2)
    codes = torch.cat((groups & 15, groups >> 4), dim=2).float() - 8
    return (codes * scales.float()[..., None]).flatten(1)


def matmul_dequantise(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x (M, K) times the weight's transpose -> (M, N), dequantising a slice of rows at a time.

    The reference of all int8 backends, and the fast one for many rows. Codes are exact in every
    dtype, so the scale comes last; in float16 it comes first, where sums of codes would overflow.
    """
    outputs = torch.empty(x.shape[0], codes.shape[0], dtype=x.dtype, device=x.device)
    for start in range(0, codes.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        weight, scale = codes[rows].to(x.dtype), scales[rows].to(x.dtype)
        if x.dtype == torch.float16:
            outputs[:, rows] = F.linear(x, weight * scale[:, None])
        else:
            outputs[:, rows] = F.linear(x, weight) * scale
    return outputs


def matmul_int4_dequantise(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """x (M, K) times the transpose of a packed weight -> (M, N), a slice of its rows at a time.

    packed: (N, K/2) uint8; scales: (N, K/32) float16.
    """
    outputs = torch.empty(x.shape[0], packed.shape[0], dtype=x.dtype, device=x.device)
    for start in range(0, packed.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        weight = dequantise_int4(packed[rows], scales[rows])
        outputs[:, rows] = F.linear(x, weight.to(x.dtype))
    return outputs


def matmul_int4_triton(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The same by our own CUDA kernels, which read packed codes."""
    if x.shape[0] > TRITON_MAX_ROWS:
        return matmul_int4_dequantise(x, packed, scales)
    from chatserve.models.triton.int4_matmul import matmul_int4

    return matmul_int4(x, packed, scales)


def matmul_int8pack(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x (M, K) in the scales' dtype -> (M, N) by PyTorch's operator, which reads packed codes."""
    return torch._weight_int8pack_mm(x, codes, scales)


def matmul_cpu(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The faster of both on a CPU, by the number of activation rows (measured: ADR 002).

    Operands in float32 are computed in bfloat16: the operator's float32 path is slower than
    an uncompressed product.
    """
    if x.shape[0] > INT8PACK_MAX_ROWS_CPU:
        return matmul_dequantise(x, codes, scales)
    return matmul_int8pack(x.to(scales.dtype), codes, scales).to(x.dtype)


def matmul_triton(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x (M, K) in the scales' dtype -> (M, N) by our own CUDA kernels, which read packed codes."""
    if x.shape[0] > TRITON_MAX_ROWS:
        return matmul_dequantise(x, codes, scales)
    from chatserve.models.triton.int8_matmul import matmul_int8

    return matmul_int8(x, codes, scales)


def backend_for(backend: Int8Backend, rows: int, columns: int) -> Int8Backend:
    """`backend`, or the reference where PyTorch's operator cannot take a matrix of this size.

    On the CPU it reads past the end of rows that are no multiple of its vector width; on Metal it
    wants both sizes to be multiples of 32. Our own kernels take any size.
    """
    if backend == "triton":
        return backend
    is_even = columns % _TILE == 0 and (backend != "int8pack" or rows % _TILE == 0)
    return backend if is_even else "dequantise"


MATMULS: Mapping[Int8Backend, Int8Matmul] = {
    "cpu": matmul_cpu,
    "int8pack": matmul_int8pack,
    "triton": matmul_triton,
    "dequantise": matmul_dequantise,
}
"""All but that of bitsandbytes, which has codes and scales of its own."""
