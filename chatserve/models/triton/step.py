"""A batch as device tensors: one buffer of int32, filled on the host and copied in one piece.

A buffer may be larger than its batch: rows and tables that are left over are padding, which stores
nothing and reads nothing. So one buffer, and one CUDA graph, serves all batches up to its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from chatserve.models.batch import Batch, Segment
from chatserve.models.triton.attention_prefill import Run, tiles_of

_Ints = np.ndarray[tuple[int, ...], np.dtype[np.int32]]

MAX_SHORT = 8
"""Segments of so many tokens, decode and drafted runs, are attended row by row."""
MIN_WHOLE = 128
"""Prompts of so many tokens without a past go to PyTorch's flash attention."""


@dataclass(frozen=True)
class Plan:
    """Which rows are attended how: the first `num_short` one by one, then tiles and whole runs."""

    num_rows: int
    num_tables: int
    table_width: int
    num_short: int = 0
    tiles: Sequence[tuple[int, int, int, int]] = ()
    whole: Sequence[slice] = ()
    output_rows: Sequence[int] | None = None

    @property
    def is_short(self) -> bool:
        return self.num_short == self.num_rows


def plan_for(batch: Batch, block_size: int, shortest_window: int | None) -> Plan:
    """How to run `batch`; `output_rows` is None where all rows are wanted."""
    segments = batch.segments
    num_rows = len(batch.token_ids)
    num_leading = next(
        (index for index, item in enumerate(segments) if item.num_tokens > MAX_SHORT),
        len(segments),
    )
    whole: list[slice] = []
    runs: list[Run] = []
    for index, segment in enumerate(segments[num_leading:], num_leading):
        is_within = shortest_window is None or segment.num_tokens <= shortest_window
        if segment.num_past == 0 and segment.num_tokens >= MIN_WHOLE and is_within:
            whole.append(segment.rows)
        else:
            runs.append(Run(segment.start, segment.num_tokens, segment.num_past, index))
    has_all = len(batch.output_rows) == num_rows
    return Plan(
        num_rows,
        len(segments),
        max(-(-segment.num_total // block_size) for segment in segments),
        segments[num_leading].start if num_leading < len(segments) else num_rows,
        tiles_of(runs),
        whole,
        None if has_all else batch.output_rows,
    )


class StepBuffer:
    """The integers of a step on the device. Views into one tensor; `write` fills them."""

    def __init__(self, plan: Plan, block_size: int, device: torch.device) -> None:
        self.plan = plan
        self._block_size = block_size
        num_rows, num_outputs = plan.num_rows, len(plan.output_rows or ())
        shapes: list[tuple[int, ...]] = [(num_rows,)] * 5
        shapes += [(plan.num_tables, plan.table_width), (len(plan.tiles), 4), (num_outputs,)]
        ends = np.cumsum([math.prod(shape) for shape in shapes]).tolist()
        self._host = np.zeros(ends[-1], dtype=np.int32)
        self._device = torch.zeros(ends[-1], dtype=torch.int32, device=device)
        places = [
            (slice(start, end), shape)
            for start, end, shape in zip([0, *ends], ends, shapes, strict=False)
        ]
        self._parts = [self._host[place].reshape(shape) for place, shape in places]
        views = [self._device[place].reshape(shape) for place, shape in places]
        (
            self.token_ids, self.positions, self.slots, self.lengths, self.table_rows,
            self.tables, self.tiles, self.output_rows,
        ) = views  # fmt: skip

    def write(self, batch: Batch) -> None:
        """Put `batch` in, padding behind it. It has at most the rows and tables of the plan."""
        token_ids, positions, slots, lengths, table_rows, tables, tiles, output_rows = self._parts
        num_rows = len(batch.token_ids)
        for part in (token_ids, positions, lengths, table_rows):
            part[num_rows:] = 0
        slots[num_rows:] = -1
        token_ids[:num_rows] = batch.token_ids
        positions[:num_rows] = batch.positions
        lengths[:num_rows] = positions[:num_rows] + 1
        for index, segment in enumerate(batch.segments):
            block_ids = self._write_table(tables[index], segment)
            table_rows[segment.rows] = index
            place = positions[segment.rows]
            size = self._block_size
            slots[segment.rows] = block_ids[place // size] * size + place % size
        if self.plan.tiles:
            tiles[:] = self.plan.tiles
        if self.plan.output_rows:
            output_rows[:] = self.plan.output_rows
        self._device.copy_(torch.from_numpy(self._host))

    def _write_table(self, table: _Ints, segment: Segment) -> _Ints:
        num_blocks = -(-segment.num_total // self._block_size)
        table[:num_blocks] = segment.block_ids[:num_blocks]
        return table
