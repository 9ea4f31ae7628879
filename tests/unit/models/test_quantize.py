"""int8 rows: the error bound, odd rows, agreement of the backends, size in memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from chatserve.models.device import choose_policy
from chatserve.models.linear import Int8Linear, Linear, build_matrix
from chatserve.models.quantize import (
    MATMULS,
    backend_for,
    matmul_dequantise,
    quantise_rows,
)

INT8 = choose_policy("cpu", "bfloat16", load_8bit=True)


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(rows, 1, generator=generator).exp()
    return torch.randn(rows, columns, generator=generator) * spread


@example(7, 2, 42, torch.float16, torch.float32)
@given(
    st.integers(1, 9), st.integers(1, 70), st.integers(0, 10_000),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_error_is_half_a_step_plus_the_rounding_of_the_scale(
    rows: int, columns: int, seed: int, dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    weight = weights(rows, columns, seed).to(dtype)
    codes, scales = quantise_rows(weight, scale_dtype)
    restored = codes.double() * scales.double()[:, None]
    error = (restored - weight.double()).abs().amax(1)
    largest = weight.double().abs().amax(1)
    bound = largest / 254 * (1 + torch.finfo(scale_dtype).eps)
    bound += largest * torch.finfo(torch.float32).eps  # the division itself is float32
    tiny = torch.finfo(scale_dtype).smallest_normal
    assert (error <= bound + tiny).all()
    assert codes.min() >= -127


def test_an_all_zero_row_stays_zero() -> None:
    weight = weights(4, 64)
    weight[2] = 0
    codes, scales = quantise_rows(weight, torch.bfloat16)
    for name in sorted(MATMULS.keys() - {"triton"}):  # whose tests interpret it
        y = MATMULS[name](torch.ones(1, 64, dtype=torch.bfloat16), codes, scales)
        assert torch.isfinite(y).all() and y[0, 2] == 0


def test_the_weight_itself_is_left_alone() -> None:
    weight = weights(3, 5)
    before = weight.clone()
    quantise_rows(weight, torch.float32)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("backend", ["cpu", "int8pack"])
@pytest.mark.parametrize("num_rows", [1, 2, 8, 9, 40])
def test_backends_agree_with_the_reference(backend: str, num_rows: int) -> None:
    codes, scales = quantise_rows(weights(1500, 96), torch.bfloat16)
    x = torch.randn(num_rows, 96, generator=torch.Generator().manual_seed(1))
    expected = matmul_dequantise(x, codes, scales)
    actual = MATMULS[backend](x.bfloat16(), codes, scales).float()  # type: ignore[index]
    assert (actual - expected).abs().max() <= 0.02 * expected.abs().max()


def test_rows_may_arrive_in_pieces() -> None:
    weight = weights(12, 32)
    whole, pieces = (Int8Linear(12, 32, bias=False, policy=INT8, backend="cpu") for _ in "ab")
    whole.load_rows(0, weight)
    for start in (8, 0, 4):
        pieces.load_rows(start, weight[start : start + 4])
    assert torch.equal(whole.codes, pieces.codes) and torch.equal(whole.scales, pieces.scales)


def test_packed_matrix_takes_at_most_053_of_half_precision() -> None:
    packed = build_matrix(1024, 576, bias=False, policy=INT8)
    half = build_matrix(1024, 576, bias=False, policy=choose_policy(
        "cpu", "bfloat16", load_8bit=False))  # fmt: skip
    assert isinstance(packed, Int8Linear) and isinstance(half, Linear)
    assert packed.codes.nbytes + packed.scales.nbytes <= 0.53 * half.weight.nbytes


def test_a_tied_embedding_reads_the_packed_rows() -> None:
    weight = weights(40, 32)
    packed = Int8Linear(40, 32, bias=False, policy=INT8, backend="cpu")
    packed.load_rows(0, weight)
    ids = torch.tensor([3, 39, 3])
    rows = packed.embed(ids, torch.float32)
    assert (rows - weight[ids]).abs().max() <= weight[ids].abs().max() / 200


_ODD_SIZES = """
import torch
from chatserve.models.device import choose_policy
from chatserve.models.linear import Int8Linear
policy = choose_policy("cpu", "bfloat16", load_8bit=True)
for backend in ("cpu", "int8pack"):
    for rows, columns in ((5, 7), (64, 40), (33, 100), (33, 64), (320, 72), (1, 1), (96, 16)):
        weight = torch.randn(rows, columns)
        matrix = Int8Linear(rows, columns, bias=False, policy=policy, backend=backend)
        matrix.load_rows(0, weight)
        for num_rows in (1, 4, 20):
            x = torch.randn(num_rows, columns).bfloat16()
            error = (matrix(x).float() - x.float() @ weight.T).abs().max()
            assert error < 0.2 + 0.03 * columns**0.5, (backend, rows, columns, num_rows, error)
"""


def test_odd_sizes_are_computed_by_the_reference() -> None:
    """In a process of its own: PyTorch's operator reads past the end of such matrices."""
    subprocess.run([sys.executable, "-c", _ODD_SIZES], check=True, timeout=120)


def test_metal_gets_its_operator_only_for_multiples_of_32() -> None:
    assert backend_for("int8pack", 32_000, 4096) == "int8pack"
    assert backend_for("int8pack", 32_001, 4096) == "dequantise"  # Vicuna v0's head
    assert backend_for("int8pack", 32_000, 100) == "dequantise"
    assert backend_for("cpu", 32_001, 4096) == "cpu"


@pytest.mark.parametrize("num_rows", [1, 12])
def test_large_activations_do_not_overflow_float16(num_rows: int) -> None:
    codes, scales = quantise_rows(torch.full((64, 512), 0.01), torch.float16)
    x = torch.full((num_rows, 512), 100.0, dtype=torch.float16)
    y = matmul_dequantise(x, codes, scales)
    assert (y.float() - 512).abs().max() < 2


@pytest.mark.parametrize("load_8bit", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_biases_are_added(num_rows: int, dtype: str, load_8bit: bool) -> None:
    policy = choose_policy("cpu", dtype, load_8bit=load_8bit)
    matrix = build_matrix(64, 32, bias=True, policy=policy)
    matrix.load_rows(0, torch.zeros(64, 32))
    bias = torch.arange(64.0)
    assert matrix.bias is not None
    matrix.bias.load_rows(0, bias)
    y = matrix(torch.ones(num_rows, 32, dtype=policy.dtype))
    assert torch.equal(y.float(), bias.expand(num_rows, -1))
