"""Networks driven by hand: one sequence in a pool of its own."""

from __future__ import annotations

from collections.abc import Iterable
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
        token_ids = [int(id_) for id_ in ids]
        rows = range(len(token_ids))
        positions = [self._num_past + row for row in rows]
        segment = Segment(0, len(token_ids), self._num_past, self._block_ids)
        self._num_past += len(token_ids)
        return self._model.forward(Batch(token_ids, positions, [segment], rows), self.pool).clone()


def logits(model: Model[Any], ids: Iterable[int] | torch.Tensor) -> torch.Tensor:
    """(T, V) logits of a whole prompt."""
    token_ids = list(ids)
    return Solo(model, tuple(range(len(token_ids) // BLOCK_SIZE + 1))).feed(token_ids)
