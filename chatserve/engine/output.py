"""Token ids to text that is safe to show: incremental UTF-8 and stop strings. Linear cost.

Knows no queue and no chunk. Text is withheld while a character is incomplete or while its end may
still become a stop string; nothing of a stop string is ever given out.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """The part of a tokenizer that turns ids into text."""

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token; empty for special tokens."""
        ...


class ShownTokenBytes:
    """As `tokenizer`, but some special tokens have a text."""

    def __init__(self, tokenizer: TokenBytes, shown: Mapping[int, str]) -> None:
        self._tokenizer = tokenizer
        self._shown = {token_id: text.encode() for token_id, text in shown.items()}

    def token_bytes(self, token_id: int) -> bytes:
        return self._shown.get(token_id) or self._tokenizer.token_bytes(token_id)


class Detokenizer:
    """Bytes of tokens to text, character by character.

    A byte sequence that can no longer become a character turns into U+FFFD, as any UTF-8 decoder
    does; one that is merely incomplete is withheld, and dropped if the sequence ends there.
    """

    def __init__(self, tokenizer: TokenBytes, *, strip_leading_space: bool) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_leading_space = strip_leading_space

    def add(self, token_id: int) -> str:
        """The characters that `token_id` completes."""
        text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        if text and self._strip_leading_space:
            self._strip_leading_space = False
            text = text.removeprefix(" ")
        return text


class StopMatcher:
    """Finds the first stop string across token borders and withholds what may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(text for text in stop if text)
        self._pending = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Feed text; returns what is safe to show and whether a stop string was met.

        After a match the text before it is safe and everything from it on is gone.
        """
        if not self._stop:
            return text, False
        self._pending += text
        position = self._first_match()
        if position is not None:
            safe, self._pending = self._pending[:position], ""
            return safe, True
        keep = self._partial_length()
        cut = len(self._pending) - keep
        safe, self._pending = self._pending[:cut], self._pending[cut:]
        return safe, False

    def finish(self) -> str:
        """What was withheld for a stop string that never came."""
        text, self._pending = self._pending, ""
        return text

    def _first_match(self) -> int | None:
        positions = [self._pending.find(text) for text in self._stop]
        return min((position for position in positions if position >= 0), default=None)

    def _partial_length(self) -> int:
        """Length of the longest end of the pending text that begins a stop string."""
        longest = 0
        for text in self._stop:
            for length in range(min(len(text) - 1, len(self._pending)), longest, -1):
                if self._pending.endswith(text[:length]):
                    longest = length
                    break
        return longest


class OutputText:
    """The visible text of one sequence: detokenizer and stop matcher together."""

    def __init__(
        self, tokenizer: TokenBytes, stop: Sequence[str], *, strip_leading_space: bool = False
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, strip_leading_space=strip_leading_space)
        self._matcher = StopMatcher(stop)

    def add(self, token_id: int, *, is_hidden: bool = False) -> tuple[str, bool]:
        """Safe new text, and whether a stop string was met. A hidden token gives no text."""
        if is_hidden:
            return "", False
        return self._matcher.add(self._detokenizer.add(token_id))

    def finish(self) -> str:
        """The rest, at the end of a sequence that no stop string ended."""
        return self._matcher.finish()
