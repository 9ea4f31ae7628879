"""A planned step to logits: the only engine file that prepares a batch for the model.

No queues, no text.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import Generic

import torch

from chatserve.engine.block_manager import Copy
from chatserve.engine.scheduler import Scheduled
from chatserve.models.batch import Batch, Model, Pool, Segment
from chatserve.models.kernel_sampler import Ahead


class Runner(Generic[Pool]):
    """Runs the model's forward over its pool."""

    def __init__(self, model: Model[Pool], num_blocks: int, block_size: int) -> None:
        self._model = model
        self._pool = model.build_kv_pool(num_blocks, block_size)

    @torch.inference_mode()
    def copy(self, copies: Iterable[Copy]) -> None:
        """Copy blocks, before anything is written to them."""
        for source, target in copies:
            self._pool.copy_block(source, target)

    @torch.inference_mode()
    def read(self, token_ids: Rows[int]) -> torch.Tensor:
        """Logits (N, V) after each token of a text. Overwrites the first blocks of the pool."""
        num_tokens = len(token_ids)
        blocks = range(-(-num_tokens // self._pool.block_size))
        rows = range(num_tokens)
        batch = Batch(token_ids, rows, [Segment(0, num_tokens, 0, blocks)], rows)
        return self._model.forward(batch, self._pool)

    @torch.inference_mode()
    def run(
        self, items: Rows[Scheduled], ahead: Ahead | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits (R, V) of what is sampled, in order; R may be 0. Then the hidden states of what is
        pooled, (P, hidden) float32 on the host, where there is any.

        An item has a row for each position that is scored; a sampled one then has a row for the end
        of the sequence and one for each token of its draft.
        `ahead`: see `Batch`.
        Stores the scheduled tokens' keys and values in each sequence's blocks.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        output_rows: list[int] = []
        hidden_rows: list[int] = []
        for item in items:
            sequence, first = item.sequence, item.sequence.num_computed
            start, end = len(token_ids), first + item.num_tokens
            token_ids += sequence.token_ids[first:end]
            output_rows += (start + position - first for position in item.scored)
            hidden_rows += (start + position - first for position in item.pooled)
            if item.is_sampled:
                output_rows.append(len(token_ids) - 1)
            if item.draft_ids:
                output_rows += range(len(token_ids), len(token_ids) + len(item.draft_ids))
                token_ids += item.draft_ids
                end += len(item.draft_ids)
            positions += range(first, end)
            adapter = sequence.adapter.network if sequence.adapter is not None else None
            segments.append(Segment(start, end - first, first, sequence.table.block_ids, adapter))
        hidden = torch.empty(len(hidden_rows), self._model.hidden_size) if hidden_rows else None
        batch = Batch(token_ids, positions, segments, output_rows, ahead, hidden_rows, hidden)
        return self._model.forward(batch, self._pool), hidden
