"""Admission: how many requests a worker takes on, whose, and when to come back. No thread, no HTTP.

A place is a sequence that runs or waits, or a request that is still being read. There are as many
as may run and wait. Of a full house a key that has less than its fair share still gets some beyond
that, so that nobody is kept out by another's flood; work of the batch priority leaves a quarter of
the queue to those who sit and wait.
"""

from __future__ import annotations

import math
from collections import Counter

from chatserve.engine.waiting_line import Priority
from chatserve.errors import Overloaded

MAX_RETRY_S = 60
"""Clients of OpenAI wait no longer than that because a server says so."""
_FIRST_ANSWER = 128.0  # tokens, until one has ended
_DECAY = 0.98  # a step's weight after the next; of answers, see `note_answer`


class Pace:
    """How fast the engine has been of late. One writer; whoever reads may be a step behind."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._seconds = 0.0
        self.mean_answer = _FIRST_ANSWER

    def note_step(self, num_tokens: int, seconds: float) -> None:
        self._num_tokens = self._num_tokens * _DECAY + num_tokens
        self._seconds = self._seconds * _DECAY + seconds

    def note_answer(self, num_tokens: int) -> None:
        """An answer has ended of itself."""
        self.mean_answer += 0.1 * (num_tokens - self.mean_answer)

    @property
    def tokens_per_s(self) -> float:
        """0 before the first step."""
        return self._num_tokens / self._seconds if self._seconds else 0.0

    def wait_s(self, num_ahead: int) -> float:
        """How long `num_ahead` more answers take; 0 while nothing is known."""
        rate = self.tokens_per_s
        return num_ahead * max(1.0, self.mean_answer) / rate if rate else 0.0


class Place:
    """A request's claim, from the door until its sequences have places of their own."""

    def __init__(self, admission: Admission, share: bytes) -> None:
        self._admission = admission
        self._share = share
        self._is_open = True
        admission.add(share)

    def release(self) -> None:
        if self._is_open:
            self._is_open = False
            self._admission.remove(self._share)

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Admission:
    """Lives on the event loop; counts places by `share`: the key that a request came with."""

    def __init__(
        self, max_num_seqs: int, max_num_waiting: int, max_num_seqs_per_key: int | None = None
    ) -> None:
        """`max_num_seqs_per_key` may run and wait at once; None: as many as there are."""
        self.pace = Pace()
        self._max_num_seqs = max_num_seqs
        self._max_num_waiting = max_num_waiting
        self._max_num_seqs_per_key = max_num_seqs_per_key
        self._counts: Counter[bytes] = Counter()
        self._total = 0

    @property
    def limit(self) -> int:
        """Places for whoever comes."""
        return self._max_num_seqs + self._max_num_waiting

    @property
    def hard_limit(self) -> int:
        """Places in all, with those beyond `limit`."""
        return self.limit + math.ceil(self._max_num_waiting / 2)

    @property
    def wait_s(self) -> float:
        """What who comes now has to expect before it runs."""
        return self.pace.wait_s(self.num_waiting)

    @property
    def num_waiting(self) -> int:
        return max(0, self._total - self._max_num_seqs)

    def enter(self, share: bytes) -> Place:
        """Claim one place for a request that is still to be read. Raises `Overloaded`."""
        self.check(share)
        return Place(self, share)

    def add(self, share: bytes) -> None:
        self._counts[share] += 1
        self._total += 1

    def remove(self, share: bytes) -> None:
        self._total -= 1
        self._counts[share] -= 1
        if not self._counts[share]:
            del self._counts[share]

    def check(self, share: bytes, priority: Priority = "interactive") -> None:
        """Raises `Overloaded` where there is no place for one more of this key."""
        own = self._counts.get(share, 0)
        most = self._max_num_seqs_per_key
        if most is not None and share and own >= most:
            raise self._overloaded(
                f"{own} requests of this key are under way already, the limit for one key is {most}"
            )
        if priority == "batch" and self._total >= self.limit - self._max_num_waiting // 4:
            raise self._overloaded(
                f"{self.num_waiting} requests are waiting already, the rest of the queue is for "
                "interactive ones"
            )
        if self._total < self.limit:
            return
        num_keys = len(self._counts) + (not own)
        if self._total < self.hard_limit and own < self.limit // num_keys:
            return
        raise self._overloaded(
            f"{self.num_waiting} requests are waiting already, the limit is {self._max_num_waiting}"
        )

    def _overloaded(self, reason: str) -> Overloaded:
        retry_after_s = min(MAX_RETRY_S, max(1, math.ceil(self.wait_s)))
        return Overloaded(f"{reason}; try again in {retry_after_s} s", retry_after_s=retry_after_s)
