"""Which of a question's answers are compared, and which one is the best. Knows no files."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True)
class ScoredAnswer:
    """`text` is Markdown."""

    answer_id: str
    text: str
    score: int


@dataclass(frozen=True)
class Pair:
    """`chosen` has the higher score."""

    chosen: ScoredAnswer
    rejected: ScoredAnswer


def best_answer(answers: Sequence[ScoredAnswer]) -> ScoredAnswer | None:
    """The highest score, of equals the older; None where all were voted down, or there is none."""
    best = max(answers, key=lambda each: each.score, default=None)
    return best if best is not None and best.score >= 0 else None


def pairs_of(answers: Sequence[ScoredAnswer], most: int, key: str) -> list[Pair]:
    """At most `most` pairs of unequal score and text; which ones is decided by hashes with `key`.

    No pair prefers one of two answers that the votes do not tell apart.
    """
    return heapq.nsmallest(most, _all_pairs(answers), key=lambda pair: _lot(pair, key))


def _all_pairs(answers: Sequence[ScoredAnswer]) -> Iterator[Pair]:
    for chosen in answers:
        for rejected in answers:
            if chosen.score > rejected.score and chosen.text != rejected.text:
                yield Pair(chosen, rejected)


def _lot(pair: Pair, key: str) -> bytes:
    name = f"{key}:{pair.chosen.answer_id}:{pair.rejected.answer_id}"
    return blake2b(name.encode(), digest_size=16).digest()
