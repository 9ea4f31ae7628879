"""A model's tokens as llguidance wants them: bytes by id, and the ids that end an answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from llguidance import LLTokenizer


class Tokenizer(Protocol):
    """The part of `chatserve.models.tokenizer.Tokenizer` that is needed here."""

    @property
    def eos_ids(self) -> frozenset[int]: ...
    @property
    def forbidden_ids(self) -> frozenset[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...


@dataclass(frozen=True)
class Vocabulary:
    """tokens: the text of each id; empty for what no answer may hold. end_ids: allowed at the end.

    As many tokens as the model has logits.
    """

    tokens: tuple[bytes, ...]
    end_ids: tuple[int, ...]

    @staticmethod
    def of(tokenizer: Tokenizer, vocab_size: int, stop_ids: Iterable[int] = ()) -> Vocabulary:
        """`stop_ids` end an answer, too."""
        ends = {each for each in (*tokenizer.eos_ids, *stop_ids) if 0 <= each < vocab_size}
        textless = ends | tokenizer.forbidden_ids
        tokens = tuple(
            b"" if each in textless else tokenizer.token_bytes(each) for each in range(vocab_size)
        )
        return Vocabulary(tokens, tuple(sorted(ends)))

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": [token.decode("latin-1") for token in self.tokens],
            "end_ids": self.end_ids,
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> Vocabulary:
        tokens = tuple(token.encode("latin-1") for token in value["tokens"])
        return Vocabulary(tokens, tuple(value["end_ids"]))

    def build(self) -> LLTokenizer:
        """Takes about a tenth of a second for 50,000 tokens. There has to be an end id."""
        from llguidance import LLTokenizer

        # its stub asks for a class that the library does not need
        wrapper: Any = _Wrapper(self)
        return LLTokenizer(
            wrapper,
            n_vocab=len(self.tokens),
            eos_token=list(self.end_ids),
            slices=LLTokenizer.json_slices(),
        )


class _Wrapper:
    """llguidance's view of a tokenizer. Nothing is ever encoded: grammars are built without forced
    text, so a mask needs no Python."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.eos_token_id = vocabulary.end_ids[0]

    def __call__(self, _text: str) -> list[int]:
        raise NotImplementedError("no text is encoded for a grammar")
