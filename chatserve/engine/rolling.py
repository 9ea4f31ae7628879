"""Which messages of a chat that has outgrown its context stay. Plain data; no tokens, no template.

A turn begins with a user's message and has all that answers it: it stays or goes as a whole, so
that no answer is left without its question. System messages always stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rolled:
    """A prompt for which the oldest turns may have given way.

    `messages_dropped`: their places in the request; `num_tokens_dropped`: by how much the prompt
    has become shorter.
    """

    ids: Sequence[int]
    messages_dropped: tuple[int, ...] = ()
    num_tokens_dropped: int = 0


class Turns:
    """The turns of a chat, counted from the newest on."""

    def __init__(self, roles: Sequence[str]) -> None:
        self._roles = roles
        # without a question there is nothing that could go
        self._starts = [i for i, role in enumerate(roles) if role == "user"][::-1] or [0]

    @property
    def count(self) -> int:
        return len(self._starts)

    def places(self, num_kept: int) -> list[int]:
        """The messages that stay with the newest `num_kept` turns."""
        start = self._starts[num_kept - 1]
        return [i for i, role in enumerate(self._roles) if i >= start or role == "system"]

    def dropped(self, num_kept: int) -> tuple[int, ...]:
        """The others."""
        kept = set(self.places(num_kept))
        return tuple(i for i in range(len(self._roles)) if i not in kept)


def most_that_fit(count: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `count` that fits; 1 does, and so does all below one that does.

    Doubles before it bisects: what is looked at is not much longer than what fits, however long the
    rest may be.
    """
    low, high = 1, 2
    while high <= count and fits(high):
        low, high = high, 2 * high
    high = min(high, count + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
