"""What a relay keeps of a stream to go on with it at another worker: the request and its journal.

Bounded, per stream and over all of them: what does not fit is not kept, and that stream ends with
its worker. Knows no block's meaning, but that one begins the journal.
"""

from __future__ import annotations

import re

MAX_STREAM_BYTES = 8 * 1024 * 1024
MAX_BYTES = 256 * 1024 * 1024
_FIRST_BYTES = 4 * 1024
_STEP_BYTES = 64 * 1024
# a block of a choice that says which token it brings
_TOKEN = re.compile(rb"^:[tf] \d+ \d", re.MULTILINE)


class MemoryBudget:
    """How much all streams together may keep."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes

    def can_take(self, num_bytes: int) -> bool:
        return self.num_bytes + num_bytes <= self._max_bytes

    def take(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes

    def give(self, num_bytes: int) -> None:
        self.num_bytes -= num_bytes


class StreamMemory:
    """Of one stream, whose request has the body `body`. To be closed."""

    def __init__(
        self, budget: MemoryBudget, body: bytes, max_bytes: int = MAX_STREAM_BYTES
    ) -> None:
        self.start = b""
        self._budget = budget
        self._body = body
        self._max_bytes = max_bytes
        self._blocks = bytearray()
        self._num_taken = 0
        # 0 once nothing is kept any more
        self._room = 0
        self._grow(_FIRST_BYTES)

    @property
    def is_kept(self) -> bool:
        return bool(self._room)

    @property
    def journal(self) -> bytes:
        return self.start + self._blocks

    @property
    def num_bytes(self) -> int:
        """Of blocks behind the start; a place in the journal."""
        return len(self._blocks)

    def begin(self, start: bytes) -> None:
        """A stream that goes on elsewhere begins as it began."""
        self.start = self.start or start

    def keep(self, block: bytes) -> None:
        if self._room:
            self._blocks += block
            if len(self._blocks) > self._room:
                self._grow(max(_STEP_BYTES, len(block)))

    def has_tokens_since(self, place: int) -> bool:
        return _TOKEN.search(self._blocks, place) is not None

    def forget(self) -> None:
        """Keep nothing any more."""
        self._budget.give(self._num_taken)
        self._num_taken = self._room = 0
        self._blocks = bytearray()

    def _grow(self, more: int) -> None:
        room = self._room + more
        num_bytes = len(self._body) + room
        extra = num_bytes - self._num_taken
        if num_bytes > self._max_bytes or not self._budget.can_take(extra):
            self.forget()
            return
        self._budget.take(extra)
        self._num_taken, self._room = num_bytes, room
