"""One row in half precision: the product, and the choice between it and the library's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.unit.models.triton_device import DEVICE, is_close

# isort: split

from chatserve.models.config import ModelConfig
from chatserve.models.device import DevicePolicy
from chatserve.models.linear import Linear
from chatserve.models.llama import Block
from chatserve.models.triton.matrices import choose_row_product
from chatserve.models.triton.row_product import linear_row
from tests import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 96), (5, 1041)])
def test_one_row(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator).to(dtype)
    x = torch.randn(1, shape[1], generator=generator).to(dtype)
    actual = linear_row(x.to(DEVICE), weight.to(DEVICE))
    assert actual.dtype == dtype
    assert is_close(actual, F.linear(x.float(), weight.float()))


def test_the_faster_product_is_chosen_for_each_kind() -> None:
    policy = DevicePolicy(DEVICE, torch.float32, "plain", None, ())
    config = ModelConfig.from_hf(tiny.build_hf_model("qwen2").config.to_dict())
    blocks = [Block(config, layer, policy) for layer in range(2)]
    qkv, down = blocks[1].attention.qkv, blocks[1].mlp.down
    assert isinstance(qkv, Linear) and isinstance(down, Linear) and qkv.bias is not None
    torch.nn.init.normal_(qkv.bias.weight)
    for block in blocks:
        for matrix in (block.attention.qkv, block.attention.output, block.mlp.gate_up, down):
            assert isinstance(matrix, Linear)
            torch.nn.init.normal_(matrix.weight)  # what memory held before may be infinite
    # library, own: of qkv, output, gate_up and down; ours must gain more than a hair
    times = iter([1.0, 0.5, 1.0, 2.0, 1.0, 0.99, 1.0, 1.0])

    def timer(function: Callable[[], object]) -> float:
        function()
        return next(times)

    x = torch.randn(1, config.hidden_size, device=DEVICE)
    before = qkv(x)
    choose_row_product(blocks, timer)
    assert [
        isinstance(matrix, Linear) and matrix.multiply_row is linear_row
        for block in blocks
        for matrix in (block.attention.qkv, block.attention.output,
                       block.mlp.gate_up, block.mlp.down)
    ] == [True, False, False, False] * 2  # fmt: skip
    assert is_close(qkv(x), before)
    assert is_close(qkv(x.expand(3, -1))[2:], before)
