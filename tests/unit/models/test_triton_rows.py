"""Kernels over single rows: norms, rotary embedding with the KV store, SwiGLU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.unit.models.triton_device import DEVICE, is_close

# isort: split

from chatserve.models.config import RopeConfig
from chatserve.models.rope import RotaryTable, rotate
from chatserve.models.triton.norm import add_rms_norm, rms_norm
from chatserve.models.triton.rope_store import HeadNorms, rope_store
from chatserve.models.triton.swiglu import swiglu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 96, 1030])
def test_rms_norm(size: int, dtype: torch.dtype) -> None:
    x, weight = randn(5, size, dtype=dtype), randn(size, dtype=dtype)
    expected = F.rms_norm(x.float(), (size,), weight.float(), 1e-5)
    assert is_close(rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_norm_updates_the_residual(dtype: torch.dtype) -> None:
    x, before, weight = randn(3, 80, dtype=dtype), randn(2, 3, 80, dtype=dtype)[1], randn(80)
    residual = before.to(DEVICE, copy=True)
    out = add_rms_norm(x.to(DEVICE), residual, weight.to(DEVICE, dtype), 1e-5)
    total = before + x
    assert is_close(residual, total, roundings=1)  # the interpreter cuts bfloat16 off
    assert is_close(out, F.rms_norm(total.float(), (80,), weight.to(dtype).float(), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    both = randn(3, 2 * 1100, dtype=dtype) * 8
    gate, up = both.float().chunk(2, dim=1)
    assert is_close(swiglu(both.to(DEVICE)), F.silu(gate) * up)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dtype", "has_norm"), [
    (4, 2, 64, torch.float16, False),
    (3, 1, 48, torch.float32, False),
    (2, 2, 32, torch.bfloat16, True),
    (4, 1, 128, torch.float32, True),
])  # fmt: skip
def test_rope_store(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, has_norm: bool
) -> None:
    num_rows = 5
    qkv = randn(num_rows, heads + 2 * kv_heads, head_dim, dtype=dtype)
    positions = torch.tensor([0, 7, 3, 3, 40])
    slots = torch.tensor([70, 3, 31, 32, 127])
    table = RotaryTable(RopeConfig(), head_dim, torch.device("cpu"), dtype)
    cos, sin = table.at(torch.arange(64), 64)
    norms = HeadNorms(randn(head_dim, dtype=dtype), randn(head_dim, dtype=dtype) + 1, 1e-6)

    turned = qkv[:, : heads + kv_heads].float()
    if has_norm:
        turned = torch.cat((
            F.rms_norm(turned[:, :heads], (head_dim,), norms.query.float(), norms.eps),
            F.rms_norm(turned[:, heads:], (head_dim,), norms.key.float(), norms.eps),
        ), dim=1)  # fmt: skip
    turned = rotate(turned, cos[positions].float(), sin[positions].float())

    pool = torch.full((2, 4, 32, kv_heads, head_dim), 9, dtype=dtype, device=DEVICE)
    actual = qkv.to(DEVICE, copy=True)
    rope_store(
        actual,
        positions.to(DEVICE),
        slots.to(DEVICE),
        (cos[:, 0].to(DEVICE), sin[:, 0].to(DEVICE)),
        (pool[0], pool[1]),
        heads,
        HeadNorms(norms.query.to(DEVICE), norms.key.to(DEVICE), norms.eps) if has_norm else None,
    )
    values = qkv[:, heads + kv_heads :]
    assert is_close(actual[:, : heads + kv_heads], turned)
    assert torch.equal(actual[:, heads + kv_heads :].cpu(), values)
    keys_stored, values_stored = pool.flatten(1, 2).cpu()
    assert torch.equal(keys_stored[slots], actual[:, heads : heads + kv_heads].cpu())
    assert torch.equal(values_stored[slots], values)
    untouched = torch.ones(128, dtype=torch.bool)
    untouched[slots] = False
    assert (keys_stored[untouched] == 9).all() and (values_stored[untouched] == 9).all()
