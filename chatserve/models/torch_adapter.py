"""Adapters on PyTorch's operators: the rows of a batch, grouped by adapter. No files, no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from chatserve.models.adapter import Adapter
from chatserve.models.adapter_places import adapter_places
from chatserve.models.batch import Batch, NetworkAdapter
from chatserve.models.config import ModelConfig
from chatserve.models.device import DevicePolicy


@dataclass(frozen=True)
class _Part:
    """What is added to the columns `columns` of a product's output: x a^T b^T, b scaled."""

    columns: slice
    a: torch.Tensor
    b: torch.Tensor


class TorchAdapter:
    """A LoRA adapter in the dtype and on the device of one network."""

    def __init__(
        self,
        adapter: Adapter,
        config: ModelConfig,
        policy: DevicePolicy,
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        """`devices`: of each of the network's matrices, where they are not all on one."""
        places = adapter_places(config)
        self.num_bytes = 0
        self.parts: dict[int, list[_Part]] = {}
        """By `Place.matrix`."""
        for name, pair in adapter.pairs.items():
            place = places[name.removesuffix(".weight")]
            device = devices[place.matrix] if devices else policy.device
            a, b = (each.to(device, policy.dtype) for each in (pair.a, pair.b * pair.scale))
            columns = slice(place.start, place.start + place.rows)
            self.parts.setdefault(place.matrix, []).append(_Part(columns, a, b))
            self.num_bytes += (a.numel() + b.numel()) * policy.dtype.itemsize


class AdaptedRows:
    """The rows of a batch that have an adapter."""

    def __init__(self, by_row: Sequence[NetworkAdapter | None], device: torch.device) -> None:
        rows: dict[TorchAdapter, list[int]] = {}
        for row, adapter in enumerate(by_row):
            if adapter is not None:
                assert isinstance(adapter, TorchAdapter)
                rows.setdefault(adapter, []).append(row)
        self._groups = [
            (adapter, torch.tensor(places, device=device)) for adapter, places in rows.items()
        ]
        self._by_row = by_row
        self._device = device

    @staticmethod
    def of(batch: Batch, device: torch.device) -> AdaptedRows | None:
        """None where no row has one, as in most batches."""
        if all(segment.adapter is None for segment in batch.segments):
            return None
        by_row: list[NetworkAdapter | None] = [None] * len(batch.token_ids)
        for segment in batch.segments:
            by_row[segment.rows] = [segment.adapter] * segment.num_tokens
        return AdaptedRows(by_row, device)

    def select(self, rows: Sequence[int]) -> AdaptedRows:
        """Of the batch's `rows` alone, in their order."""
        return AdaptedRows([self._by_row[row] for row in rows], self._device)

    def change(self, y: torch.Tensor, x: torch.Tensor, matrix: int) -> None:
        """Add to y (N, out), which `matrix` made of x (N, in), what each row's adapter adds."""
        for adapter, rows in self._groups:
            for part in adapter.parts.get(matrix, ()):
                y[rows, part.columns] += F.linear(F.linear(x[rows], part.a), part.b)
