"""Who runs in the next step: waiting and running sequences under a token budget. No tensors.

Decode first, then prefill in chunks with what is left of the budget, first come first served. A
sequence is admitted only when its worst case fits the KV cache.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from chatserve.engine.kv_cache import KVCache, SequenceKV
from chatserve.engine.sequence import SamplingParams, Sequence, Status
from chatserve.errors import ContextLengthExceeded


@dataclass(frozen=True)
class Scheduled:
    """The next `num_tokens` uncomputed tokens of a sequence take part in the step."""

    sequence: Sequence
    num_tokens: int
    cache: SequenceKV

    @property
    def is_sampled(self) -> bool:
        """Whether the step reaches the sequence's end, so that a token is sampled."""
        return self.num_tokens == self.sequence.num_uncomputed


class Scheduler:
    """Keeps the queues; `schedule` picks a batch, the engine moves the sequences along."""

    def __init__(
        self,
        kv_cache: KVCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        self._kv_cache = kv_cache
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: dict[str, tuple[Sequence, SequenceKV]] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def check(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        """Raises `ContextLengthExceeded` when such a sequence could never fit the KV cache."""
        worst_case = num_prompt_tokens + params.max_tokens
        if worst_case > self._kv_cache.num_tokens:
            raise ContextLengthExceeded(
                f"prompt and max_tokens need {worst_case:,} tokens of KV cache, this machine's "
                f"memory holds {self._kv_cache.num_tokens:,}; ask for fewer max_tokens",
                param="max_tokens",
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that passed `check`."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or aborted sequence out and free its cache; also while it waits."""
        if self._running.pop(sequence.seq_id, None) is None:
            self._waiting = deque(item for item in self._waiting if item is not sequence)
        self._kv_cache.free(sequence.seq_id)
        sequence.status = Status.FINISHED

    def schedule(self) -> list[Scheduled]:
        """Pick the next step's batch; empty when there is nothing to do."""
        self._admit()
        budget = self._max_num_batched_tokens
        batch: list[Scheduled] = []
        by_need = sorted(self._running.values(), key=lambda item: item[0].num_uncomputed > 1)
        for sequence, cache in by_need:
            num_tokens = min(sequence.num_uncomputed, budget)
            if num_tokens:
                batch.append(Scheduled(sequence, num_tokens, cache))
                budget -= num_tokens
        return batch

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            worst_case = _worst_case(sequence)
            if not self._kv_cache.can_allocate(worst_case):
                return
            self._waiting.popleft()
            cache = self._kv_cache.allocate(sequence.seq_id, worst_case)
            sequence.status = Status.RUNNING
            self._running[sequence.seq_id] = (sequence, cache)


def _worst_case(sequence: Sequence) -> int:
    return sequence.num_prompt_tokens + sequence.params.max_tokens
