"""Where Triton kernels run in tests: on the GPU, or in Triton's interpreter over CPU tensors.

Imported first by each test of them: the interpreter is chosen when triton is imported
(tests/conftest.py does it, too, for who imports it sooner).
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed (the dev extra brings it on Linux)")


def is_close(actual: torch.Tensor, expected: torch.Tensor, *, roundings: float = 4) -> bool:
    """Within so many roundings of actual's dtype, relative to the largest value; NaN never is.

    In float32 the order of a long sum counts, so the unit there is sixteen roundings.
    """
    unit = torch.finfo(actual.dtype).eps * (16 if actual.dtype == torch.float32 else 1)
    expected = expected.to(actual.device).float()
    error = (actual.float() - expected).abs().max()
    return bool(error <= roundings * unit * expected.abs().max())


def _teach_bfloat16() -> None:
    """Triton 3.6 and 3.7 interpret bfloat16 as its bits, taken for integers, in two places.

    These are products and conversions from integers; both go through float32 here.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    multiply, convert = Builder.create_dot, Builder.cast_impl

    def create_dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        if left.dtype.scalar == tl.bfloat16:
            left, right = (convert(self, side, tl.float32) for side in (left, right))
        return multiply(self, left, right, *rest)

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if dtype.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            source = convert(self, source, tl.float32)
        return convert(self, source, dtype)

    Builder.create_dot, Builder.cast_impl = create_dot, cast_impl


if DEVICE.type == "cpu":
    _teach_bfloat16()
