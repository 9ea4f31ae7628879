"""Grammars in tests: a vocabulary of single bytes, and whether a text matches."""

from __future__ import annotations

import functools

import numpy as np
from llguidance import LLTokenizer

from chatserve.engine.grammar import Matcher
from chatserve.grammar.matcher import pristine_matcher
from chatserve.grammar.source import KINDS_OF_JSON, to_llguidance
from chatserve.grammar.vocabulary import Vocabulary

END_ID = 256
BYTES = Vocabulary((*(bytes([each]) for each in range(256)), b""), (END_ID,))


@functools.cache
def byte_tokenizer() -> LLTokenizer:
    return BYTES.build()


class Language:
    """All answers that match. Raises `Rejected` and `BadGrammar` as compiling does."""

    def __init__(self, kind: str, source: str, *, after_space: bool = False) -> None:
        text = to_llguidance(kind, source, after_space=after_space)
        self._matcher = pristine_matcher(byte_tokenizer(), text, is_json=kind in KINDS_OF_JSON)

    def __contains__(self, answer: str) -> bool:
        matcher = self._matcher.deep_copy()
        ids = list(answer.encode())
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def allowed_ids(matcher: Matcher, vocab_size: int) -> set[int]:
    """The tokens that may come next."""
    words = np.zeros((vocab_size + 31) // 32, np.uint32)
    matcher.fill_mask(words)
    return set(np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0].tolist())
