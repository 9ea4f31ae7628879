"""Questions in an order that a seed decides: all of them, then all of them in another order."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Query:
    """A question as the policy is asked it, and its tokens."""

    text: str
    ids: tuple[int, ...]


class Deck:
    """Knows what is asked at any place of a run, whatever was asked before."""

    def __init__(self, queries: Sequence[Query], seed: int) -> None:
        self._queries = queries
        self._seed = seed
        self._round = -1
        self._order: list[int] = []

    def at(self, place: int) -> Query:
        """What is asked at `place`, from 0, of the run."""
        number, index = divmod(place, len(self._queries))
        if number != self._round:
            self._order = list(range(len(self._queries)))
            random.Random(seed_for(self._seed, number, "order")).shuffle(self._order)
            self._round = number
        return self._queries[self._order[index]]


def seed_for(seed: int, number: int, purpose: str) -> int:
    """63 bits of a run's `seed` for one purpose at one step."""
    digest = hashlib.sha256(f"{seed} {number} {purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
