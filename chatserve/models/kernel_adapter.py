"""Adapters as the CPU kernels read them: half precision, in the order of packed matrices."""

from __future__ import annotations

import ctypes

import torch

from chatserve.errors import DoesNotFit, ModelLoadError
from chatserve.kernels import library
from chatserve.kernels.library import Kernels, LowRank
from chatserve.models.adapter import Adapter, LoraPair
from chatserve.models.adapter_places import MATRICES, Place, adapter_places, num_matrices
from chatserve.models.config import ModelConfig
from chatserve.models.kernel_limits import padded


class _Change:
    """What an adapter adds to one fused matrix: all its parts' ranks, one behind the other."""

    def __init__(self, parts: list[tuple[Place, LoraPair]], rows: int, *, is_gate_up: bool) -> None:
        self._a: list[torch.Tensor] = []
        self._b: list[torch.Tensor] = []
        self._scales: list[torch.Tensor] = []
        self._spans = torch.zeros(padded(rows) // library.SPAN_ROWS, 3, dtype=torch.int32)
        self._rank = self._num_b = 0
        for place, pair in parts:
            first = place.start // library.SPAN_ROWS
            step = 1
            if is_gate_up:  # 16 rows of gate, 16 rows of up, and so on
                first, step = int(place.start > 0), 2
            self._add(pair, first, step)
        self._pad(parts[0][0].columns)
        self.a, self.b = torch.cat(self._a).half(), torch.cat(self._b).half()
        self.scales = torch.cat(self._scales)

    @property
    def num_bytes(self) -> int:
        return 2 * (self.a.numel() + self.b.numel()) + 4 * (
            self.scales.numel() + self._spans.numel()
        )

    def low_rank(self) -> LowRank:
        return LowRank(
            a=self.a.data_ptr(), b=self.b.data_ptr(), scales=self.scales.data_ptr(),
            spans=self._spans.data_ptr(), rank=self._rank, num_b=self._num_b,
        )  # fmt: skip

    def _add(self, pair: LoraPair, first_span: int, step: int) -> None:
        rank, span = len(pair.a), library.SPAN_ROWS
        # the largest of each rank near 1, by powers of two: half precision has no small numbers
        a, exponents_a = _near_one(pair.a)
        b, exponents_b = _near_one(pair.b.T)
        ones = torch.full((rank,), pair.scale, dtype=torch.float32)
        num_spans = -(-b.shape[1] // span)
        whole = b.new_zeros(rank, num_spans * span)
        whole[:, : b.shape[1]] = b
        spans = self._spans[first_span : first_span + step * num_spans : step]
        spans[:, 0], spans[:, 1] = self._rank, rank
        spans[:, 2] = self._num_b + rank * torch.arange(num_spans)
        self._a.append(a)
        self._b.append(whole.view(rank, num_spans, span).transpose(0, 1).reshape(-1, span))
        self._scales.append(torch.ldexp(ones, exponents_a + exponents_b))
        self._rank += rank
        self._num_b += rank * num_spans

    def _pad(self, columns: int) -> None:
        if missing := -self._rank % library.RANK_UNIT:
            self._a.append(torch.zeros(missing, columns))
            self._scales.append(torch.zeros(missing))
            self._rank += missing


class KernelAdapter:
    """A LoRA adapter for one network on the kernels."""

    def __init__(
        self, adapter: Adapter, config: ModelConfig, kernels: Kernels, shape: library.Shape
    ) -> None:
        """`shape`: of the network. Raises `ModelLoadError` for ranks over what the kernels take."""
        places = adapter_places(config)
        parts: dict[int, list[tuple[Place, LoraPair]]] = {}
        for name, pair in adapter.pairs.items():
            place = places[name.removesuffix(".weight")]
            parts.setdefault(place.matrix, []).append((place, pair))
        for matrix in parts:
            _check_rank(adapter, sum(len(pair.a) for _, pair in parts[matrix]))
        rows = _rows(config)
        head = num_matrices(config) - 1
        changes = {
            matrix: _Change(
                each,
                config.vocab_size if matrix == head else rows[matrix % len(MATRICES)],
                is_gate_up=matrix != head and MATRICES[matrix % len(MATRICES)] == "gate_up",
            )
            for matrix, each in parts.items()
        }
        table = (LowRank * num_matrices(config))()
        for matrix, change in changes.items():
            table[matrix] = change.low_rank()
        handle = kernels.functions.cs_adapter_create(ctypes.byref(shape), table)
        if not handle:
            raise DoesNotFit(f"no memory for the adapter {adapter.name}")
        self.handle: int = handle
        library.destroy_with(self, kernels.functions.cs_adapter_destroy, handle)
        self.num_bytes = sum(change.num_bytes for change in changes.values())


def _near_one(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row times a power of two, its largest magnitude below 1; and the exponents taken out."""
    _, exponents = torch.frexp(values.abs().amax(1))
    return torch.ldexp(values, -exponents[:, None]), exponents


def _rows(config: ModelConfig) -> tuple[int, ...]:
    """Of a block's fused matrices."""
    heads = config.num_heads + 2 * config.num_kv_heads
    hidden = config.hidden_size
    return (heads * config.head_dim, hidden, 2 * config.intermediate_size, hidden)


def _check_rank(adapter: Adapter, rank: int) -> None:
    if rank > library.MAX_RANK:
        raise ModelLoadError(
            f"{adapter.path}: the adapter has {rank:,} ranks in one matrix (q, k and v, or gate "
            f"and up, together), the CPU kernels take {library.MAX_RANK:,}; merge it while "
            f"loading: --adapter {adapter.path}"
        )
