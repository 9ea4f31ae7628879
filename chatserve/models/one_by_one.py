"""A network whose sequences run one after another: none is ever a row of another one's product.

PyTorch's products round a row differently among others and alone. Around such a network a
sequence's logits depend on its own tokens and on how many of them are computed together, which is
the scheduler's business. Knows no network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Generic

import torch

from chatserve.models.batch import Batch, Model, Pool, Segment


class OneByOne(Generic[Pool]):
    """`model` with a forward for each segment of a batch."""

    def __init__(self, model: Model[Pool]) -> None:
        self._model = model
        self.vocab_size = model.vocab_size
        self.hidden_size = model.hidden_size

    def build_kv_pool(self, num_blocks: int, block_size: int) -> Pool:
        return self._model.build_kv_pool(num_blocks, block_size)

    def forward(self, batch: Batch, pool: Pool) -> torch.Tensor:
        """As `Model.forward`."""
        # the model may give every call the same memory
        logits = [
            self._model.forward(_alone(batch, segment), pool).clone() for segment in batch.segments
        ]
        return logits[0] if len(logits) == 1 else torch.cat(logits)


def _alone(batch: Batch, segment: Segment) -> Batch:
    first, end = segment.start, segment.start + segment.num_tokens
    places = [i for i, row in enumerate(batch.hidden_rows) if first <= row < end]
    return Batch(
        batch.token_ids[first:end],
        batch.positions[first:end],
        [replace(segment, start=0)],
        [row - first for row in batch.output_rows if first <= row < end],
        hidden_rows=[batch.hidden_rows[i] - first for i in places],
        # rows ascend: those of a segment are neighbours, and a view of them is filled
        hidden=batch.hidden[places[0] : places[-1] + 1]
        if batch.hidden is not None and places
        else None,
    )
