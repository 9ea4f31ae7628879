"""A compiled grammar and the places of answers in it, on llguidance's matcher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatserve.errors import GenerationFailed
from chatserve.grammar.limits import parser_limits
from chatserve.grammar.source import KINDS_OF_JSON

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray

    from chatserve.engine.grammar import GrammarOrigin

MAX_REASON_CHARS = 200


class Rejected(Exception):
    """llguidance cannot or will not compile a grammar; the message is its own."""


class Matcher:
    """One answer's place; see `chatserve.engine.grammar.Matcher`. For one thread at a time."""

    def __init__(self, inner: LLMatcher) -> None:
        self._inner = inner

    def fill_mask(self, words: NDArray[np.uint32]) -> None:
        """Other threads run Python meanwhile. Raises `GenerationFailed`."""
        self._inner.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._inner.is_error():
            raise _lost(self._inner.get_error())

    def accept(self, token_id: int) -> None:
        if not self._inner.consume_token(token_id):
            raise _lost(self._inner.get_error())

    @property
    def is_finished(self) -> bool:
        return self._inner.is_stopped()


class Grammar:
    """Compiled; see `chatserve.engine.grammar.Grammar`."""

    def __init__(self, origin: GrammarOrigin, pristine: LLMatcher) -> None:
        self.origin = origin
        self._pristine = pristine

    @staticmethod
    def compile(tokenizer: LLTokenizer, text: str, origin: GrammarOrigin) -> Grammar:
        """`text` is what `origin` is to llguidance. Raises `Rejected`."""
        is_json = origin.kind in KINDS_OF_JSON
        return Grammar(origin, pristine_matcher(tokenizer, text, is_json=is_json))

    def matcher(self) -> Matcher:
        # a copy has the first mask ready
        return Matcher(self._pristine.deep_copy())


def pristine_matcher(tokenizer: LLTokenizer, text: str, *, is_json: bool) -> LLMatcher:
    """At the beginning of any answer, with the first mask computed. Raises `Rejected`."""
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, text, log_level=0, limits=parser_limits(is_json=is_json))
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise Rejected(matcher.get_error())
    return matcher


def short_reason(error: str) -> str:
    """llguidance's words on one line: without its own state and without excerpts."""
    lines = []
    for line in error.splitlines():
        if line.startswith("<"):
            break
        # an excerpt of the grammar has line numbers or is only indented
        if line.strip() and not line.startswith("  "):
            lines.append(line.strip())
    return " ".join(lines).removesuffix(":")[:MAX_REASON_CHARS]


def _lost(error: str) -> GenerationFailed:
    return GenerationFailed(
        f"the answer can no longer be held to what it must match ({short_reason(error)}); "
        "make the grammar or schema simpler"
    )
