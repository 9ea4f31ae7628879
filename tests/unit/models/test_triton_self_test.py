"""The start-up test of the Triton network: passes on what is right, tells what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.models.triton_device import DEVICE

# isort: split

from chatserve.models.device import DevicePolicy
from chatserve.models.triton import network, self_test


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":  # the interpreter runs a program for each row and head
        monkeypatch.setattr(self_test, "_COUNTS", (12, 1))


def policy(dtype: torch.dtype = torch.float32) -> DevicePolicy:
    return DevicePolicy(DEVICE, dtype, "sdpa", None, ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_right_kernels_pass(dtype: torch.dtype) -> None:
    assert self_test.failure(policy(dtype)) is None


@pytest.mark.parametrize("name", ["attend_rows", "swiglu", "rms_norm"])
def test_a_kernel_that_is_a_little_wrong_is_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(network, name)
    monkeypatch.setattr(network, name, lambda *args, **options: real(*args, **options) * 1.01)
    assert self_test.failure(policy()) == "its logits differ from the CPU's"


def test_nan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "swiglu", lambda both: both[:, ::2] * torch.nan)
    assert self_test.failure(policy()) == "its logits differ from the CPU's"


def test_a_compiler_that_is_missing_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(network, "rope_store", fails)
    assert self_test.failure(policy()) == "RuntimeError: Failed to find C compiler."


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_right_products_pass(dtype: torch.dtype) -> None:
    assert self_test.products_failure(policy(dtype)) is None


@pytest.mark.parametrize("name", ["matmul_int8", "matmul_int4"])
def test_a_product_that_is_a_little_wrong_is_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(self_test, name)
    monkeypatch.setattr(self_test, name, lambda *args: real(*args) * 1.01)
    assert self_test.products_failure(policy()) == "they differ from the CPU's"
