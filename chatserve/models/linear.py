"""Matrices of a network that know how to be filled row by row, in 16, 8 or 4 bits; embeddings.

The loader streams checkpoint tensors into `load_rows`; fused projections (qkv, gate and up) are one
matrix filled in several calls. Nothing here knows a family or a file.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from chatserve.models import bitsandbytes_linear
from chatserve.models.device import DevicePolicy
from chatserve.models.packing import GROUP, Packing
from chatserve.models.quantize import (
    MATMULS,
    Int8Backend,
    backend_for,
    dequantise_int4,
    matmul_int4_dequantise,
    matmul_int4_triton,
    quantise_int4,
    quantise_rows,
)

RowProduct = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""x (1, K) and W (N, K) to (1, N)."""


def _vector_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mv(weight, x[0]).unsqueeze(0)


class Parameter:
    """A bare tensor (a norm's weight, a bias) filled like a matrix."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.weight = torch.zeros(size, device=device, dtype=dtype)

    def load_rows(self, start: int, rows: torch.Tensor) -> None:
        self.weight[start : start + rows.shape[0]].copy_(rows)


class Linear:
    """y = x W^T + b in the weight's dtype. x: (M, K), W: (N, K), y: (M, N)."""

    def __init__(self, rows: int, columns: int, *, bias: bool, policy: DevicePolicy) -> None:
        device, dtype = policy.device, policy.dtype
        self.weight = torch.empty(rows, columns, device=device, dtype=dtype)
        self.bias = Parameter(rows, device, dtype) if bias else None
        self.multiply_row: RowProduct | None = None
        """Takes the place of F.linear for a single row, where it is faster."""
        if device.type == "cpu" and dtype == torch.bfloat16:
            self.multiply_row = _vector_product  # 0.7 of the time

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias.weight if self.bias is not None else None
        if self.multiply_row is not None and x.shape[0] == 1:
            y = self.multiply_row(x, self.weight)
            return y if bias is None else y + bias
        return F.linear(x, self.weight, bias)

    def load_rows(self, start: int, rows: torch.Tensor) -> None:
        self.weight[start : start + rows.shape[0]].copy_(rows)

    def rows(self, start: int, count: int) -> torch.Tensor:
        return self.weight[start : start + count]

    def embed(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows of ids (N,) as (N, K): a tied head serves as the embedding too."""
        return F.embedding(ids, self.weight).to(dtype)


class Int8Linear:
    """The same product over packed int8 rows; the half-precision matrix never exists whole."""

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        bias: bool,
        policy: DevicePolicy,
        backend: Int8Backend,
    ) -> None:
        device = policy.device
        self.codes = torch.empty(rows, columns, device=device, dtype=torch.int8)
        self.scales = torch.empty(rows, device=device, dtype=policy.scale_dtype)
        self.bias = Parameter(rows, device, policy.dtype) if bias else None
        self._matmul = MATMULS[backend_for(backend, rows, columns)]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self._matmul(x, self.codes, self.scales)
        return y if self.bias is None else y + self.bias.weight

    def load_rows(self, start: int, rows: torch.Tensor) -> None:
        codes, scales = quantise_rows(rows, self.scales.dtype)
        self.codes[start : start + rows.shape[0]].copy_(codes)
        self.scales[start : start + rows.shape[0]].copy_(scales)

    def embed(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.codes[ids].to(dtype) * self.scales[ids].to(dtype).unsqueeze(-1)


class Int4Linear:
    """The same product over 4-bit codes, one scale per group of 32 columns."""

    def __init__(self, rows: int, columns: int, *, bias: bool, policy: DevicePolicy) -> None:
        device = policy.device
        self.packed = torch.empty(rows, columns // 2, device=device, dtype=torch.uint8)
        self.scales = torch.empty(rows, columns // GROUP, device=device, dtype=torch.float16)
        self.bias = Parameter(rows, device, policy.dtype) if bias else None
        self._matmul = matmul_int4_triton if policy.int8 == "triton" else matmul_int4_dequantise

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self._matmul(x, self.packed, self.scales)
        return y if self.bias is None else y + self.bias.weight

    def load_rows(self, start: int, rows: torch.Tensor) -> None:
        packed, scales = quantise_int4(rows)
        self.packed[start : start + rows.shape[0]].copy_(packed)
        self.scales[start : start + rows.shape[0]].copy_(scales)

    def embed(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return dequantise_int4(self.packed[ids], self.scales[ids]).to(dtype)


class BitsAndBytesLinear:
    """The same product in LLM.int8 or NF4."""

    def __init__(
        self, rows: int, columns: int, *, bias: bool, policy: DevicePolicy, packing: Packing
    ) -> None:
        self.packed = bitsandbytes_linear.build(rows, columns, packing, policy.device)
        self.bias = Parameter(rows, policy.device, policy.dtype) if bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.packed.multiply(x)
        return y if self.bias is None else y + self.bias.weight

    def load_rows(self, start: int, rows: torch.Tensor) -> None:
        self.packed.load_rows(start, rows)

    def embed(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.packed.dequantise(ids, dtype)


Matrix = Linear | Int8Linear | Int4Linear | BitsAndBytesLinear


def build_matrix(rows: int, columns: int, *, bias: bool, policy: DevicePolicy) -> Matrix:
    """A matrix (rows, columns) in the form that the policy asks for; its content is not set."""
    if policy.int8 is None:
        return Linear(rows, columns, bias=bias, policy=policy)
    if policy.int8 == "bitsandbytes":
        packing = policy.packing or Packing()
        return BitsAndBytesLinear(rows, columns, bias=bias, policy=policy, packing=packing)
    if policy.packing is not None and policy.packing.bits == 4:
        return Int4Linear(rows, columns, bias=bias, policy=policy)
    return Int8Linear(rows, columns, bias=bias, policy=policy, backend=policy.int8)
