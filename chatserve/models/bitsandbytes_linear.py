"""Matrices in the forms of the package bitsandbytes: LLM.int8 and NF4, filled row by row.

LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339) multiplies 8-bit weights with 8-bit activations,
and those columns apart in which an activation is large. NF4 (2023, arXiv 2305.14314 §3) has 4 bits
a weight and a scale per 64. Quantised on their own device, a few rows at a time: no matrix is ever
whole in half precision. Knows nothing of networks.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from types import ModuleType

import torch

from chatserve.errors import ModelLoadError, UsageError
from chatserve.models.packing import Packing

NF4_GROUP = 64
"""Weights of a row that share a scale."""
_OUTLIER = 6.0  # from which on an activation is large: the paper's §3.2
_FAULTS = {8: 0.03, 4: 0.15}  # of a product, by bits; measured on random matrices: a third of it


def require_package() -> None:
    """Raises `UsageError` without the package; does not import it, which takes seconds."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            "--quant-backend bitsandbytes needs the package of that name: `pip install "
            "bitsandbytes`, or leave the flag out"
        )


@functools.cache
def package() -> ModuleType:
    """The package, without the kernels that it would fetch and run: a path never opens a socket."""
    # it warns of their absence, and at each product of its rounding
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)
    there = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's way to hide a package
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        del sys.modules["kernels"]
        if there is not None:
            sys.modules["kernels"] = there


class LLMInt8:
    """W (N, K) as codes (N, K) int8 and the largest magnitude of each row (N,) float32."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.codes = torch.empty(rows, columns, device=device, dtype=torch.int8)
        self.scales = torch.empty(rows, device=device, dtype=torch.float32)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x (M, K) of any float dtype to x W^T (M, N) of the same."""
        bnb = package()
        state = bnb.MatmulLtState()
        state.CB, state.SCB, state.threshold = self.codes, self.scales, _OUTLIER
        state.has_fp16_weights = state.is_training = False
        y: torch.Tensor = bnb.matmul(x, self.codes, state=state)
        return y

    def load_rows(self, start: int, rows: torch.Tensor) -> None:
        place = slice(start, start + rows.shape[0])
        rows = rows.to(self.codes.device, torch.float16)
        self.codes[place], self.scales[place], _ = package().functional.int8_vectorwise_quant(rows)

    def dequantise(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of W: (n,) to (n, K)."""
        return (self.codes[ids] * (self.scales[ids] / 127)[:, None]).to(dtype)


class NF4:
    """W (N, K) as two codes a byte (N, K/2), and the largest magnitude of each 64 (N, K/64)."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        """Raises `ModelLoadError` for rows that are not whole groups."""
        if columns % NF4_GROUP:
            raise ModelLoadError(
                f"NF4 weights come in groups of {NF4_GROUP}, which {columns} columns of this "
                "network are no multiple of; use --load-8bit or leave --quant-backend out"
            )
        self.codes = torch.empty(rows, columns // 2, device=device, dtype=torch.uint8)
        self.scales = torch.empty(rows, columns // NF4_GROUP, device=device, dtype=torch.float32)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """As `LLMInt8.multiply`."""
        state = self._state(self.codes, self.scales, x.dtype)
        y: torch.Tensor = package().matmul_4bit(x, self.codes.view(-1, 1).t(), state)
        return y

    def load_rows(self, start: int, rows: torch.Tensor) -> None:
        place = slice(start, start + rows.shape[0])
        codes, state = package().functional.quantize_4bit(
            rows.to(self.codes.device), blocksize=NF4_GROUP, quant_type="nf4"
        )
        self.codes[place] = codes.view(len(rows), -1)
        self.scales[place] = state.absmax.view(len(rows), -1)

    def dequantise(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """As `LLMInt8.dequantise`."""
        codes, scales = self.codes[ids], self.scales[ids]
        rows: torch.Tensor = package().functional.dequantize_4bit(
            codes.view(-1, 1), self._state(codes, scales, dtype)
        )
        return rows

    def _state(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> object:
        functional = package().functional
        state: object = functional.QuantState(
            absmax=scales.view(-1), shape=torch.Size((codes.shape[0], 2 * codes.shape[1])),
            code=_nf4_values(codes.device), blocksize=NF4_GROUP, quant_type="nf4", dtype=dtype,
        )  # fmt: skip
        return state


def build(rows: int, columns: int, packing: Packing, device: torch.device) -> LLMInt8 | NF4:
    """A matrix in the form that has as many bits as `packing`; its content is not set."""
    return (NF4 if packing.bits == 4 else LLMInt8)(rows, columns, device)


def multiplies_rightly(packing: Packing, device: torch.device, dtype: torch.dtype) -> bool:
    """Products of 1 and 33 rows, one of them with an outlier, against float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=generator)
    matrix = build(96, 128, packing, device)
    matrix.load_rows(0, weight)
    for num_rows in (1, 33):
        x = torch.randn(num_rows, 128, generator=generator)
        x[-1, 5] = 20
        expected = x @ weight.T
        error = matrix.multiply(x.to(device, dtype)).float().cpu() - expected
        if not error.norm() <= _FAULTS[packing.bits] * expected.norm():
            return False
    return True


@functools.cache
def _nf4_values(device: torch.device) -> torch.Tensor:
    values: torch.Tensor = package().functional.get_4bit_type("nf4", device=device)
    return values
