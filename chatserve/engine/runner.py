"""A scheduled batch to logits: the only engine file that prepares tensors for the model.

No queues, no text.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Protocol

import torch

from chatserve.engine.scheduler import Scheduled
from chatserve.models.attention import Segment


class Model(Protocol):
    """A network over a flat batch; see `chatserve.models.llama.Llama.__call__`."""

    @property
    def device(self) -> torch.device: ...

    @property
    def vocab_size(self) -> int: ...

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        segments: Rows[Segment],
        output_rows: torch.Tensor,
    ) -> torch.Tensor: ...


class Runner:
    """Runs one step of the model."""

    def __init__(self, model: Model) -> None:
        self._model = model

    @torch.inference_mode()
    def run(self, batch: Rows[Scheduled]) -> torch.Tensor:
        """Logits (R, V) for those of the batch that are sampled, in order; R may be 0.

        Appends the scheduled tokens' keys and values to each sequence's cache.
        """
        ids: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        output_rows: list[int] = []
        for item in batch:
            first = item.sequence.num_computed
            last = first + item.num_tokens
            segments.append(Segment(len(ids), item.num_tokens, first, item.cache))
            ids += item.sequence.token_ids[first:last]
            positions += range(first, last)
            if item.is_sampled:
                output_rows.append(len(ids) - 1)
        device = self._model.device
        return self._model(
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            segments,
            torch.tensor(output_rows, dtype=torch.int64, device=device),
        )
