"""The KV cache as PyTorch tensors: one pair per layer, cut into blocks. Knows no sequence's fate.

A layer's tensors get their shapes from the first keys and values that are stored, so any network
fits; they are made once, for all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chatserve.errors import OutOfMemory
from chatserve.models.batch import Segment


@dataclass(frozen=True)
class Span:
    """Where one sequence's `num_total` tokens lie in the pool, and which `rows` are its newest.

    From slot `first_slot` on if its blocks are consecutive, else in `block_ids`, to be gathered.
    """

    rows: slice
    num_total: int
    first_slot: int
    block_ids: torch.Tensor | None = None


@dataclass(frozen=True)
class Placement:
    """Where a batch lies in the pool: found once per step, used by every layer.

    `slots`: (N,) one for each row.
    """

    slots: slice | torch.Tensor
    spans: Sequence[Span]


class TorchKVPool:
    """Per layer, keys (num_blocks, block_size, K, D) and values (num_blocks, block_size, K, E)."""

    def __init__(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._device = device
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def copy_block(self, source: int, target: int) -> None:
        for tensors in self._layers.values():
            for tensor in tensors:
                tensor[target] = tensor[source]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer in which something has been stored."""
        return self._layers[index]

    def place(self, segments: Sequence[Segment], device: torch.device | None = None) -> Placement:
        """Where the rows of `segments`, which lie side by side, are to be stored and read.

        `device`: of the layers that will, where it is not the pool's own.
        """
        device = device or self._device
        spans = [self._span(segment, device) for segment in segments]
        if len(spans) == 1 and spans[0].block_ids is None:
            end = spans[0].first_slot + spans[0].num_total
            return Placement(slice(end - segments[0].num_tokens, end), spans)
        slots = [slot for segment in segments for slot in self._slots(segment)]
        return Placement(torch.tensor(slots, device=device), spans)

    def ensure(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make a layer's tensors, unless they are there, for rows like keys and values.

        Raises `OutOfMemory` when the device cannot hold the pool.
        """
        if layer not in self._layers:
            self._layers[layer] = (self._build(keys), self._build(values))

    def store(
        self, layer: int, placement: Placement, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Keep the keys (N, K, D) and values (N, K, E) of a batch.

        Raises `OutOfMemory` when the device cannot hold the pool.
        """
        self.ensure(layer, keys, values)
        for tensor, rows in zip(self._layers[layer], (keys, values), strict=True):
            tensor.flatten(0, 1)[placement.slots] = rows

    def read(self, layer: int, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (K, S, D) and values (K, S, E) of all tokens of a sequence, in order."""
        keys, values = self._layers[layer]
        return _read(keys, span), _read(values, span)

    def _span(self, segment: Segment, device: torch.device) -> Span:
        num_blocks = -(-segment.num_total // self.block_size)
        block_ids = list(segment.block_ids[:num_blocks])
        first = block_ids[0]
        ids = None
        if block_ids != list(range(first, first + num_blocks)):
            ids = torch.tensor(block_ids, device=device)
        return Span(segment.rows, segment.num_total, first * self.block_size, ids)

    def _slots(self, segment: Segment) -> list[int]:
        size, block_ids = self.block_size, segment.block_ids
        return [
            block_ids[position // size] * size + position % size
            for position in range(segment.num_past, segment.num_total)
        ]

    def _build(self, rows: torch.Tensor) -> torch.Tensor:
        try:
            return rows.new_empty(self.num_blocks, self.block_size, *rows.shape[1:])
        except (torch.OutOfMemoryError, RuntimeError) as error:
            num_tokens = self.num_blocks * self.block_size
            raise OutOfMemory(
                f"no memory for {num_tokens:,} tokens of context on {self._device.type}; "
                "choose a smaller --context-length or --max-num-seqs"
            ) from error


def _read(tensor: torch.Tensor, span: Span) -> torch.Tensor:
    if span.block_ids is None:
        rows = tensor.flatten(0, 1)[span.first_slot : span.first_slot + span.num_total]
    else:
        rows = tensor.index_select(0, span.block_ids).flatten(0, 1)[: span.num_total]
    return rows.transpose(0, 1)
