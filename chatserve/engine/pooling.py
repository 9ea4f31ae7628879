"""From the hidden states of a prompt's tokens to one vector, chunk by chunk.

What comes out depends on the states alone, to the bit: not on how the prompt was cut.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from chatserve.engine.sequence import Pooling


class Pooler:
    """`mean`: of all of `num_tokens` tokens; `last`: the last one's state."""

    def __init__(self, pooling: Pooling, num_tokens: int) -> None:
        self._pooling = pooling
        self._num_tokens = num_tokens
        self._sum: NDArray[np.float64] | None = None

    def add(self, first: int, states: torch.Tensor) -> None:
        """The states (T, hidden) of wanted tokens, the `first` of which is token 0 of a sequence
        that begins anew, perhaps after a preemption."""
        rows = states.double().numpy()
        if self._sum is not None and first > 0 and self._pooling == "mean":
            rows = np.concatenate([self._sum[None], rows])
        # row by row, in order: the same additions whatever the chunks are
        self._sum = np.add.reduce(rows, axis=0)

    def embedding(self) -> NDArray[np.float32] | None:
        """(hidden,) once all tokens are in; None if it is not finite."""
        assert self._sum is not None
        divisor = self._num_tokens if self._pooling == "mean" else 1
        pooled = (self._sum / divisor).astype(np.float32)
        return pooled if np.isfinite(pooled).all() else None
