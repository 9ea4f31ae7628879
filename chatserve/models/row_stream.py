"""Rows from files to their places in a network, by all cores: read where they stay, or packed.

A slice for each thread is resident at most. Knows names and places, no format, no device and no
packing.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import NamedTuple

import torch

from chatserve.models.destinations import Destination, OpenRows, PackedRows
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
    def start(self) -> int:
        """The first row's place in its target."""
        return self.place.start + self.rows.start

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
    """Moves a checkpoint's rows; a context manager, for the threads that it has."""

    def __init__(self, weights: WeightSource, num_threads: int) -> None:
        self._weights = weights
        self._direct = weights if isinstance(weights, DirectSource) else None
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, "load")
        self._own = threading.local()

    def __enter__(self) -> RowStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    def move(self, wanted: Iterable[Piece]) -> Iterator[Piece]:
        """Store each piece at its place; yields them in order, when they are there.

        Raises `ModelLoadError` when a file cannot be read.
        """
        under_way: deque[tuple[Piece, Future[None]]] = deque()
        for piece in wanted:
            if (store := self._work_apart(piece)) is not None:
                under_way.append((piece, self._threads.submit(store)))
                if len(under_way) <= self._num_threads:
                    continue
                piece, done = under_way.popleft()
                done.result()
            else:
                yield from _finished(under_way)
                # no name for what is read: it would stay until the next rows are there
                piece.place.target.load_rows(piece.start, self._read(piece))
            yield piece
        yield from _finished(under_way)

    def _work_apart(self, piece: Piece) -> Callable[[], None] | None:
        """What any thread may do for a piece while others store other rows; None: nothing."""
        target = piece.place.target
        if isinstance(target, PackedRows):
            return lambda: target.load_apart(piece.start, self._read(piece))
        if self._direct is not None and isinstance(target, OpenRows):
            memory = target.rows(piece.start, len(piece.rows))
            is_plain = memory.device.type == "cpu" and memory.is_contiguous()
            if is_plain and memory.dtype == piece.info.dtype:
                return partial(self._direct.read_into, piece.info.name, piece.rows, memory)
        return None

    def _read(self, piece: Piece) -> torch.Tensor:
        """The piece in memory that this thread's next piece gets again."""
        info = piece.info
        if self._direct is None:
            return self._weights.read(info.name, piece.rows)
        num_bytes = math.prod(piece.shape) * info.dtype.itemsize
        buffer: torch.Tensor | None = getattr(self._own, "buffer", None)
        if buffer is None or buffer.numel() < num_bytes:
            # fresh memory for each slice would take twice as long as reading it
            buffer = self._own.buffer = torch.empty(num_bytes, dtype=torch.uint8)
        out = buffer[:num_bytes].view(info.dtype).view(piece.shape)
        self._direct.read_into(info.name, piece.rows, out)
        return out


def _finished(under_way: deque[tuple[Piece, Future[None]]]) -> Iterator[Piece]:
    while under_way:
        piece, done = under_way.popleft()
        done.result()
        yield piece
