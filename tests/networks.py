"""Networks driven by hand: one sequence in a pool of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from chatserve.models.batch import Batch, Model, Segment

BLOCK_SIZE = 32
CONSECUTIVE = tuple(range(8))
SCATTERED = (5, 2, 7, 0, 1, 6, 3, 4)


class Solo:
    """Feed it tokens of one sequence, get the logits of each; as many as its blocks hold."""

    def __init__(self, model: Model[Any], block_ids: tuple[int, ...] = CONSECUTIVE) -> None:
        self._model = model
        self._block_ids = block_ids
        self.pool = model.build_kv_pool(len(block_ids), BLOCK_SIZE)
        self._num_past = 0

    def feed(self, ids: Iterable[int] | torch.Tensor) -> torch.Tensor:
        """(T,) ids to (T, V) logits."""
        batch = self._batch(ids)
        batch = replace(batch, output_rows=range(len(batch.token_ids)))
        return self._model.forward(batch, self.pool).clone()

    def feed_for_states(
        self, ids: Iterable[int] | torch.Tensor, rows: Sequence[int] | None = None
    ) -> torch.Tensor:
        """(T,) ids to the final hidden states (R, hidden) of `rows`, by default of all."""
        batch = self._batch(ids)
        rows = range(len(batch.token_ids)) if rows is None else rows
        hidden = torch.full((len(rows), self._model.hidden_size), torch.nan)
        batch = replace(batch, hidden_rows=rows, hidden=hidden)
        assert self._model.forward(batch, self.pool).shape == (0, self._model.vocab_size)
        return hidden

    def _batch(self, ids: Iterable[int] | torch.Tensor) -> Batch:
        token_ids = [int(id_) for id_ in ids]
        positions = [self._num_past + row for row in range(len(token_ids))]
        segment = Segment(0, len(token_ids), self._num_past, self._block_ids)
        self._num_past += len(token_ids)
        return Batch(token_ids, positions, [segment], ())


def logits(model: Model[Any], ids: Iterable[int] | torch.Tensor) -> torch.Tensor:
    """(T, V) logits of a whole prompt."""
    token_ids = list(ids)
    return Solo(model, tuple(range(len(token_ids) // BLOCK_SIZE + 1))).feed(token_ids)
