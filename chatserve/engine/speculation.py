"""Drafts for a sequence from its own past: what followed the last time the same tokens came.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): no second model. A draft
is a guess only, the engine keeps of it what the model says itself. Knows no tensors and no blocks.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

_MAX_DRAFT = 5
_FIRST_DRAFT = 2
_NGRAM_LENS = (3, 2)  # the longer the likeness, the better the guess
# after a draft of which nothing was right, so many tokens pass without one; doubled each time
_FIRST_PAUSE, _LAST_PAUSE = 8, 256


class Drafter:
    """Guesses how the list `token_ids` goes on; the list is the sequence's own, and it grows.

    Drafts get longer while they are right and shorter while they are not; where all of one is
    wrong, there are none for a while.
    """

    def __init__(self, token_ids: Rows[int]) -> None:
        self._token_ids = token_ids
        self._num_indexed = 0
        # n-gram -> index of the token that followed it last
        self._follower: dict[tuple[int, ...], int] = {}
        self._draft_len = _FIRST_DRAFT
        self._pause = _FIRST_PAUSE
        self._resume_at = 0

    def draft(self, max_tokens: int) -> list[int]:
        """At most `max_tokens` ids that may come next; often none. Linear in what is new."""
        length = len(self._token_ids)
        if length < self._resume_at:
            return []
        self._index()
        start = self._find()
        if start is None:
            return []
        guess = list(self._token_ids[start : start + min(self._draft_len, max_tokens)])
        # a period shorter than the draft: the guess goes on with itself
        while len(guess) < min(self._draft_len, max_tokens):
            guess.append(guess[start - length])
        return guess

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """Told how much of the last draft was right."""
        if num_accepted == num_drafted:
            self._draft_len = min(2 * self._draft_len, _MAX_DRAFT)
        else:
            self._draft_len = max(1, num_accepted)
        if num_accepted:
            self._pause = _FIRST_PAUSE
        else:
            self._resume_at = len(self._token_ids) + self._pause
            self._pause = min(2 * self._pause, _LAST_PAUSE)

    def _index(self) -> None:
        ids = self._token_ids
        for index in range(self._num_indexed, len(ids)):
            for num in _NGRAM_LENS:
                if index >= num:
                    self._follower[tuple(ids[index - num : index])] = index
        self._num_indexed = len(ids)

    def _find(self) -> int | None:
        for num in _NGRAM_LENS:
            start = self._follower.get(tuple(self._token_ids[-num:]))
            if start is not None:
                return start
        return None
