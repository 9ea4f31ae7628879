"""Four-bit weights on PyTorch's operators: codes, products, matrices."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

import pytest
import torch

from chatserve.errors import ModelLoadError
from chatserve.models import quantize
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import DevicePolicy
from chatserve.models.linear import Int4Linear, build_matrix
from chatserve.models.loader import load_model
from chatserve.models.packing import Packing
from chatserve.models.quantize import dequantise_int4, matmul_int4_dequantise, quantise_int4
from tests import tiny

POLICY = DevicePolicy(
    torch.device("cpu"), torch.float32, "plain", "dequantise", (), Packing(4, True)
)


def weights(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def test_codes_are_within_one_step_of_the_weight() -> None:
    weight = weights(40, 96)
    weight[3, 32:64] = 0
    packed, scales = quantise_int4(weight)
    assert (packed.shape, scales.shape) == ((40, 48), (40, 3))
    error = (dequantise_int4(packed, scales) - weight).abs().unflatten(1, (-1, 32))
    # half a step, or a whole one at the end opposite to the group's largest entry
    assert (error <= 1.001 * scales.abs().float()[..., None]).all()
    assert error.mean() < 0.3 * scales.abs().mean()
    assert (dequantise_int4(packed, scales)[3, 32:64] == 0).all()


def test_a_byte_holds_columns_j_and_16_plus_j() -> None:
    weight = torch.arange(-8.0, 8.0).repeat(2)[None]
    weight[0, 16:] = torch.arange(7.0, -9.0, -1.0)
    packed, scales = quantise_int4(weight)
    assert scales.item() == 1
    assert packed[0].tolist() == [code | (15 - code) << 4 for code in range(16)]


def test_product_by_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "_ROWS_AT_ONCE", 7)
    packed, scales = quantise_int4(weights(20, 64))
    x = weights(3, 64)
    expected = x @ dequantise_int4(packed, scales).T
    assert torch.allclose(matmul_int4_dequantise(x, packed, scales), expected, atol=1e-5)


def test_a_matrix_is_filled_in_pieces_and_embeds() -> None:
    weight = weights(20, 64)
    matrix = build_matrix(20, 64, bias=True, policy=POLICY)
    assert isinstance(matrix, Int4Linear) and matrix.bias is not None
    matrix.load_rows(0, weight[:8])
    matrix.load_rows(8, weight[8:])
    matrix.bias.load_rows(0, torch.arange(20.0))
    rounded = dequantise_int4(*quantise_int4(weight))
    x = weights(3, 64)
    assert torch.allclose(matrix(x), x @ rounded.T + torch.arange(20.0), atol=1e-5)
    assert torch.equal(matrix.embed(torch.tensor([19, 3]), torch.float32), rounded[[19, 3]])


def test_sizes_that_groups_do_not_divide_are_refused(tmp_path: Path) -> None:
    tiny.save_model(tmp_path, intermediate_size=80)
    policy = dataclasses.replace(POLICY, network="triton")
    checkpoint = open_checkpoint(tmp_path)
    with (
        closing(checkpoint.weights),
        pytest.raises(ModelLoadError, match=r"4-bit weights .*80.* use --load-8bit"),
    ):
        load_model(checkpoint, policy)
