"""Keys and values of running sequences, within a budget of tokens. Knows no requests and no text.

First form: one growing buffer per sequence and layer. A sequence reserves its worst case (prompt
plus `max_tokens`) when it is admitted, so a running one never has to wait for memory; the buffers
themselves grow with its true length.
"""

from __future__ import annotations

import torch

from chatserve.errors import OutOfMemory

_FIRST_TOKENS = 128


class KVCache:
    """Hands out one `SequenceKV` per sequence while their reservations fit `num_tokens`."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._reserved: dict[str, int] = {}

    @property
    def num_free_tokens(self) -> int:
        return self.num_tokens - sum(self._reserved.values())

    def can_allocate(self, num_tokens: int) -> bool:
        """Whether a sequence of at most `num_tokens` fits beside the running ones."""
        return num_tokens <= self.num_free_tokens

    def allocate(self, seq_id: str, num_tokens: int) -> SequenceKV:
        """Reserve `num_tokens` for `seq_id`. The caller has asked `can_allocate`."""
        assert seq_id not in self._reserved and self.can_allocate(num_tokens)
        self._reserved[seq_id] = num_tokens
        return SequenceKV(num_tokens)

    def free(self, seq_id: str) -> None:
        """Give back what `seq_id` reserved; a sequence that holds nothing is left alone."""
        self._reserved.pop(seq_id, None)


class SequenceKV:
    """One sequence's keys and values: per layer a buffer (K, capacity, D), filled from the left.

    Shapes and dtype are learned from the first `append` of each layer, so any model fits.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._layers: dict[int, _LayerBuffer] = {}

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys (K, T, D) and values (K, T, E); return views of all so far, (K, S, ·).

        Raises `OutOfMemory` when the device cannot hold a larger buffer.
        """
        buffer = self._layers.get(layer)
        if buffer is None:
            buffer = self._layers[layer] = _LayerBuffer(self._max_tokens)
        return buffer.append(keys, values)

    def truncate(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens`, after a step that failed half-way."""
        for buffer in self._layers.values():
            buffer.length = min(buffer.length, num_tokens)


class _LayerBuffer:
    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self.length = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + keys.shape[1]
        assert end <= self._max_tokens, "the reservation was too small"
        self._keys = self._fit(self._keys, keys, end)
        self._values = self._fit(self._values, values, end)
        self._keys[:, self.length : end] = keys
        self._values[:, self.length : end] = values
        self.length = end
        return self._keys[:, :end], self._values[:, :end]

    def _fit(self, buffer: torch.Tensor | None, rows: torch.Tensor, end: int) -> torch.Tensor:
        """A buffer with room for `end` tokens that keeps what `buffer` holds."""
        if buffer is not None and end <= buffer.shape[1]:
            return buffer
        capacity = _FIRST_TOKENS if buffer is None else 2 * buffer.shape[1]
        capacity = min(max(capacity, end), self._max_tokens)
        try:
            larger = rows.new_empty(rows.shape[0], capacity, rows.shape[2])
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise OutOfMemory(
                f"no memory for {capacity:,} tokens of context on {rows.device.type}; "
                "ask for fewer max_tokens or shorten the conversation"
            ) from error
        if buffer is not None:
            larger[:, : self.length] = buffer[:, : self.length]
        return larger
