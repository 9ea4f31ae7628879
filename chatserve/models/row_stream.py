"""Rows from files to their places in a network: read where they stay, or while others are stored.

Two slices are resident at most. Knows names and places, no format, no device and no packing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import torch

from chatserve.models.destinations import Destination, OpenRows
from chatserve.models.weights import DirectSource, TensorInfo, WeightSource

SLICE_VALUES = 1 << 20  # read at a time; measured: larger ones leave larger holes in the heap


class Piece(NamedTuple):
    """Some rows of a tensor, and where the tensor goes."""

    info: TensorInfo
    rows: range
    place: Destination

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.info.shape[1:])

    @property
    def num_bytes(self) -> int:
        """On the disk."""
        return self.info.num_bytes * len(self.rows) // self.info.shape[0]


def pieces(info: TensorInfo, place: Destination) -> Iterator[Piece]:
    """All rows of a tensor, some at a time."""
    step = max(1, SLICE_VALUES // math.prod(info.shape[1:]))
    for start in range(0, info.shape[0], step):
        yield Piece(info, range(start, min(start + step, info.shape[0])), place)


class RowStream:
    """Reads a checkpoint's rows; a context manager, for the thread that reads ahead."""

    def __init__(self, weights: WeightSource) -> None:
        self._weights = weights
        self._direct = weights if isinstance(weights, DirectSource) else None
        self._reader = ThreadPoolExecutor(1, "read ahead")
        # used in turn: fresh memory for each slice takes twice as long as reading it
        self._buffers: list[torch.Tensor] = [torch.empty(0, dtype=torch.uint8)] * 2

    def __enter__(self) -> RowStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._reader.shutdown(cancel_futures=True)

    def move(self, wanted: Iterable[Piece]) -> Iterator[Piece]:
        """Store each piece at its place, in order; yields it when it is there.

        Raises `ModelLoadError` when a file cannot be read.
        """
        read: tuple[Piece, Future[torch.Tensor]] | None = None
        for number, piece in enumerate(wanted):
            memory = self._memory_of(piece)
            reading = None
            if memory is None:
                reading = piece, self._reader.submit(self._read, piece, number % 2)
            if read is not None:
                yield _stored(*read)
            read = reading
            if memory is not None and self._direct is not None:
                self._direct.read_into(piece.info.name, piece.rows, memory)
                yield piece
        if read is not None:
            yield _stored(*read)

    def _memory_of(self, piece: Piece) -> torch.Tensor | None:
        """The place itself, where it takes what the file holds as it is."""
        place, info = piece.place, piece.info
        if self._direct is None or not isinstance(place.target, OpenRows):
            return None
        memory = place.target.rows(place.start + piece.rows.start, len(piece.rows))
        is_plain = memory.device.type == "cpu" and memory.is_contiguous()
        return memory if is_plain and memory.dtype == info.dtype else None

    def _read(self, piece: Piece, turn: int) -> torch.Tensor:
        info = piece.info
        if self._direct is None:
            return self._weights.read(info.name, piece.rows)
        num_bytes = math.prod(piece.shape) * info.dtype.itemsize
        if self._buffers[turn].numel() < num_bytes:
            self._buffers[turn] = torch.empty(num_bytes, dtype=torch.uint8)
        out = self._buffers[turn][:num_bytes].view(info.dtype).view(piece.shape)
        self._direct.read_into(info.name, piece.rows, out)
        return out


def _stored(piece: Piece, read: Future[torch.Tensor]) -> Piece:
    piece.place.target.load_rows(piece.place.start + piece.rows.start, read.result())
    return piece
