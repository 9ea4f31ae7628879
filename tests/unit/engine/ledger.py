"""A network without weights whose pool remembers ids in the place of keys and values.

What it says next depends on everything that a sequence's blocks hold, so a wrong block, a missing
copy or a stale slot changes the text.
"""

from __future__ import annotations

import hashlib
from array import array

import torch

from chatserve.models.batch import Batch, Segment
from tests import tiny


class LedgerPool:
    """One token id per slot; -1 where nothing was ever written."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._slots = [[-1] * block_size for _ in range(num_blocks)]

    def copy_block(self, source: int, target: int) -> None:
        self._slots[target] = list(self._slots[source])

    def write(self, segment: Segment, batch: Batch) -> None:
        for row in range(segment.start, segment.start + segment.num_tokens):
            block, offset = divmod(batch.positions[row], self.block_size)
            self._slots[segment.block_ids[block]][offset] = batch.token_ids[row]

    def history(self, segment: Segment, num_tokens: int) -> list[int]:
        """The first tokens of a sequence."""
        num_blocks = -(-num_tokens // self.block_size)
        ids = [id_ for block in segment.block_ids[:num_blocks] for id_ in self._slots[block]]
        assert -1 not in ids[:num_tokens], "a slot is read that was never written"
        return ids[:num_tokens]


class LedgerModel:
    """Continues a text by one of `num_ids` pseudo-random ids that all of the text decides."""

    vocab_size = tiny.VOCAB_SIZE

    def __init__(self, num_ids: int = tiny.VOCAB_SIZE) -> None:
        self._num_ids = num_ids
        self.num_computed_tokens = 0
        self.num_steps = 0

    def build_kv_pool(self, num_blocks: int, block_size: int) -> LedgerPool:
        return LedgerPool(num_blocks, block_size)

    def forward(self, batch: Batch, pool: LedgerPool) -> torch.Tensor:
        self.num_steps += 1
        self.num_computed_tokens += len(batch.token_ids)
        for segment in batch.segments:
            pool.write(segment, batch)
        logits = torch.zeros(len(batch.output_rows), self.vocab_size)
        for index, row in enumerate(batch.output_rows):
            segment = next(item for item in batch.segments if row in range(*_span(item)))
            history = pool.history(segment, segment.num_past + row - segment.start + 1)
            self.write_row(logits[index], history)
        return logits

    def write_row(self, row: torch.Tensor, history: list[int]) -> None:
        """Fill the logits (V,) that follow `history`."""
        digest = hashlib.sha256(array("q", history).tobytes()).digest()
        values = torch.frombuffer(bytearray(digest * 10), dtype=torch.uint8)
        row.fill_(-1000)
        row[: self._num_ids] = values[: self._num_ids].float()


def _span(segment: Segment) -> tuple[int, int]:
    return segment.start, segment.start + segment.num_tokens
