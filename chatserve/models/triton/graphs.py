"""Decode steps captured once for each size and replayed: no launch waits for Python.

Batches are padded to the next of a few sizes. What is captured reads from one `StepBuffer` that
stays where it is. Knows no network: it captures a function of a buffer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch

from chatserve.models.batch import Batch
from chatserve.models.triton.step import Plan, StepBuffer

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 32, 64)

Forward = Callable[[StepBuffer], torch.Tensor]


class GraphBackend(Protocol):
    """Turns a function without arguments into one that repeats its device work."""

    def capture(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]: ...


class CudaGraphs:
    """CUDA's graphs. All of them share one memory pool: only one runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None  # a handle

    def capture(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """The result of a replay is the same tensor each time, overwritten by the next."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # compiles kernels and opens libraries, neither of which can be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = function()
        self._pool = graph.pool()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


class DecodeGraphs:
    """Runs batches of short segments whose rows are all wanted, by the smallest bucket that fits.

    A capture that fails is told once; from then on every step runs eagerly.
    """

    def __init__(
        self,
        forward: Forward,
        backend: GraphBackend,
        *,
        block_size: int,
        table_width: int,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._backend: GraphBackend | None = backend
        self._block_size = block_size
        self._table_width = table_width
        self._device = device
        self._captured: dict[int, tuple[StepBuffer, Callable[[], torch.Tensor]]] = {}

    def can_run(self, plan: Plan) -> bool:
        return (
            self._backend is not None
            and plan.is_short
            and plan.output_rows is None
            and plan.num_rows <= BUCKETS[-1]
            and plan.table_width <= self._table_width
        )

    def capture_all(self) -> None:
        """Before the first request, so that none waits for it; the largest first, for its memory.

        A step of each size runs, on padding alone.
        """
        for bucket in reversed(BUCKETS):
            if self._backend is not None and bucket not in self._captured:
                self._capture(bucket)

    def run(self, batch: Batch) -> torch.Tensor | None:
        """Logits (R, V), valid until the next run; None when the bucket cannot be captured."""
        num_rows = len(batch.token_ids)
        bucket = next(size for size in BUCKETS if size >= num_rows)
        captured = self._captured.get(bucket) or self._capture(bucket)
        if captured is None:
            return None
        buffer, replay = captured
        buffer.write(batch)
        return replay()[:num_rows]

    def _capture(self, bucket: int) -> tuple[StepBuffer, Callable[[], torch.Tensor]] | None:
        assert self._backend is not None
        plan = Plan(bucket, bucket, self._table_width, num_short=bucket)
        buffer = StepBuffer(plan, self._block_size, self._device)
        # nothing but padding: capturing runs the network once and must not touch anybody's blocks
        buffer.write(Batch((), (), (), ()))
        try:
            replay = self._backend.capture(lambda: self._forward(buffer))
        except RuntimeError as error:  # out of memory is one, too
            logger.warning("no CUDA graphs, decoding is slower: %s", error)
            self._backend = None
            self._captured.clear()
            return None
        self._captured[bucket] = (buffer, replay)
        return self._captured[bucket]
