"""Which tokens of one answer have been shown so far, and where in its text each begins.

Knows no JSON. Text is withheld while a character or a stop string may be incomplete, and so are the
logprobs of its tokens: a token is told with the first of its characters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from chatserve.engine.output import Detokenizer, TokenBytes
from chatserve.engine.sequence import TokenEvent, TokenLogprobs
from chatserve.server.contract import Tokenizer


class Shown(NamedTuple):
    """A token and the place in the text, in characters, where its own begins."""

    offset: int
    token_id: int
    logprobs: TokenLogprobs | None


class ShownTokens:
    """Of one answer. `end_ids` end it, and are not text whatever their bytes are.

    Tokens that a stop string hides wholly are never told; an end token is only where `tells_end`.
    """

    def __init__(
        self,
        tokenizer: TokenBytes,
        end_ids: Collection[int],
        *,
        first_offset: int,
        strip_leading_space: bool,
        tells_end: bool,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, strip_leading_space=strip_leading_space)
        self._end_ids = end_ids
        self._tells_end = tells_end
        self._waiting: deque[Shown] = deque()
        self._num_chars = self._num_shown = first_offset

    def feed(self, event: TokenEvent) -> list[Shown]:
        """The tokens that are shown by now and were not before `event`."""
        for logprobs in event.logprobs:
            self._add(logprobs)
        self._num_shown += len(event.text)
        shown = []
        while self._waiting and self._waiting[0].offset < self._num_shown:
            shown.append(self._waiting.popleft())
        if event.is_last and self._num_shown == self._num_chars:
            # no stop string took anything away: the rest has no text of its own
            shown += self._waiting
        return shown

    def _add(self, logprobs: TokenLogprobs) -> None:
        token_id = logprobs.token_id
        if token_id not in self._end_ids:
            self._waiting.append(Shown(self._num_chars, token_id, logprobs))
            self._num_chars += len(self._detokenizer.add(token_id))
        elif self._tells_end:
            self._waiting.append(Shown(self._num_chars, token_id, logprobs))


class ShownPrompt:
    """The tokens of a prompt that is shown as `text` in front of its answer."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], text: str) -> None:
        self._detokenizer = Detokenizer(
            tokenizer, strip_leading_space=tokenizer.strips_leading_space
        )
        self._ids = prompt_ids
        self._num_chars = len(text)
        self._num_told = self._offset = 0

    @property
    def is_complete(self) -> bool:
        return self._num_told == len(self._ids)

    def feed(self, scores: Sequence[TokenLogprobs | None]) -> list[Shown]:
        """The next tokens, with their scores."""
        shown = []
        for known in scores:
            token_id = self._ids[self._num_told]
            # a text need not be what its tokens decode to: tokenizers normalise
            shown.append(Shown(min(self._offset, self._num_chars), token_id, known))
            self._offset += len(self._detokenizer.add(token_id))
            self._num_told += 1
        return shown
