"""What a network computes in one step, and where it keeps keys and values. Plain data, no policy.

Sequences lie side by side in one flat batch. Their keys and values live in blocks of a pool that is
shared by all of them; a block table says which blocks, in order, hold a sequence's tokens (Kwon et
al. 2023, arXiv 2309.06180, §4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from chatserve.models.kernel_sampler import Ahead


class NetworkAdapter(Protocol):
    """A LoRA adapter in the form that one network computes with; see `Model.build_adapter`."""

    @property
    def num_bytes(self) -> int: ...


@dataclass(frozen=True)
class Segment:
    """The rows of one sequence in a flat batch, side by side, in the order of their positions.

    `start` and `num_tokens` are rows of the batch; `num_past` tokens are in the pool already.
    `block_ids` has room for `num_past + num_tokens` tokens, or more. `adapter`, which the network
    has built, changes what these rows are multiplied with, and no other row.
    """

    start: int
    num_tokens: int
    num_past: int
    block_ids: Sequence[int]
    adapter: NetworkAdapter | None = None

    @property
    def num_total(self) -> int:
        return self.num_past + self.num_tokens

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.num_tokens)


@dataclass(frozen=True)
class Batch:
    """All tokens of one step: (N,) ids and positions, the sequences they belong to.

    `output_rows`: (R,) rows whose logits are wanted, ascending; `ahead`: what a network on the
    sampler's team picks of them at once. `hidden_rows`: rows whose final normalised hidden states
    are wanted, ascending; the model fills `hidden`, a (len(hidden_rows), hidden) float32 tensor on
    the host. A segment has output rows or hidden rows, or neither.
    """

    token_ids: Sequence[int]
    positions: Sequence[int]
    segments: Sequence[Segment]
    output_rows: Sequence[int]
    ahead: Ahead | None = None
    hidden_rows: Sequence[int] = ()
    hidden: torch.Tensor | None = None


class KVPool(Protocol):
    """Keys and values of all layers in `num_blocks` blocks of `block_size` tokens each."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_size(self) -> int: ...

    def copy_block(self, source: int, target: int) -> None:
        """Make `target` hold what `source` holds, in all layers: copy on write."""
        ...


Pool = TypeVar("Pool", bound=KVPool)


class Model(Protocol[Pool]):
    """A network over flat batches. Its pool has a layout of its own, so it builds it itself."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    def build_kv_pool(self, num_blocks: int, block_size: int) -> Pool: ...

    def forward(self, batch: Batch, pool: Pool) -> torch.Tensor:
        """Logits (R, V) of `batch.output_rows`, in a float dtype.

        They are good until the next call, and the caller may overwrite them. Stores the batch's
        keys and values in the pool, fills `batch.hidden`.
        """
        ...
