"""int8 and int4 products against their dequantised weights in float32."""

from __future__ import annotations

import pytest
import torch

from tests.unit.models.triton_device import DEVICE, is_close

# isort: split

from chatserve.models.quantize import (
    TRITON_MAX_ROWS,
    dequantise_int4,
    matmul_triton,
    quantise_int4,
    quantise_rows,
)
from chatserve.models.triton import int8_matmul
from chatserve.models.triton.int4_matmul import matmul_int4
from chatserve.models.triton.int8_matmul import matmul_int8
from chatserve.models.triton.matmul_tiles import choose_tiles

SHAPES = [  # rows, outputs, columns: one row, few, many; odd sizes; split sums
    (1, 33, 96), (1, 64, 1056), (2, 70, 544), (16, 65, 2080), (17, 100, 64), (65, 130, 160),
]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def operands(
    num_rows: int, num_outputs: int, num_columns: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows * num_outputs + num_columns)
    x = torch.randn(num_rows, num_columns, generator=generator).to(dtype)
    return x, torch.randn(num_outputs, num_columns, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_product(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight = operands(*shape, dtype)
    codes, scales = quantise_rows(weight, dtype)
    actual = matmul_int8(x.to(DEVICE), codes.to(DEVICE), scales.to(DEVICE))
    expected = x.float() @ (codes.float() * scales.float()[:, None]).T
    assert actual.dtype == dtype
    assert is_close(actual, expected)


@pytest.mark.parametrize("num_columns", [9, 41])
def test_int8_product_of_odd_columns(num_columns: int) -> None:
    x, weight = operands(3, 5, num_columns, torch.float32)
    codes, scales = quantise_rows(weight, torch.float32)
    actual = matmul_int8(x.to(DEVICE), codes.to(DEVICE), scales.to(DEVICE))
    assert is_close(actual, x @ (codes * scales[:, None]).T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_product(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight = operands(*shape, dtype)
    packed, scales = quantise_int4(weight)
    actual = matmul_int4(x.to(DEVICE), packed.to(DEVICE), scales.to(DEVICE))
    assert actual.dtype == dtype
    assert is_close(actual, x.float() @ dequantise_int4(packed, scales).T)


def test_an_all_zero_row_stays_zero() -> None:
    x, weight = operands(1, 5, 64, torch.float32)
    weight[2] = 0
    codes, scales = quantise_rows(weight, torch.float32)
    actual = matmul_int8(x.to(DEVICE), codes.to(DEVICE), scales.to(DEVICE))
    assert torch.isfinite(actual).all() and actual[0, 2] == 0


def test_no_rows_give_no_rows() -> None:
    codes, scales = quantise_rows(torch.randn(8, 32), torch.float32)
    packed, groups = quantise_int4(torch.randn(8, 32))
    x = torch.empty(0, 32, device=DEVICE)
    assert matmul_int8(x, codes.to(DEVICE), scales.to(DEVICE)).shape == (0, 8)
    assert matmul_int4(x, packed.to(DEVICE), groups.to(DEVICE)).shape == (0, 8)


def test_sums_are_split_only_where_programs_are_too_few() -> None:
    assert choose_tiles(8, 4096, 4096).num_splits > 1
    assert choose_tiles(8, 32000, 4096).num_splits == 1
    assert choose_tiles(512, 4096, 4096).num_splits == 1
    assert choose_tiles(8, 64, 128).num_splits == 1


@pytest.mark.parametrize("num_rows", [3, TRITON_MAX_ROWS + 1])
def test_many_rows_are_dequantised(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = int8_matmul.matmul_int8

    def counted(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return real(x, codes, scales)

    monkeypatch.setattr(int8_matmul, "matmul_int8", counted)
    x, weight = operands(num_rows, 5, 24, torch.float32)
    codes, scales = quantise_rows(weight, torch.float32)
    y = matmul_triton(x.to(DEVICE), codes.to(DEVICE), scales.to(DEVICE))
    assert is_close(y, x @ (codes * scales[:, None]).T)
    assert calls == ([3] if num_rows == 3 else [])
