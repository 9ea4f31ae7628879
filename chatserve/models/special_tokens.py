"""Special tokens as values: what a rendered prompt is made of, and where they stand in a text.

Knows no vocabulary beyond the special tokens, no roles and no templates.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import tokenizers
from tokenizers.models import BPE

from chatserve.errors import ModelLoadError

MAX_ADDED_TOKENS = 1 << 16
MAX_TOKEN_CHARS = 256


class Special(str):
    """A special token inside a rendered prompt; a plain `str` beside it is ordinary text."""

    __slots__ = ()


Rendered = list[str | Special]


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched as a whole, outside the vocabulary's own splitting.

    `special` marks control tokens, which are never shown; `<think>` and its like are not.
    `lstrip` and `rstrip` let the token swallow the white space before or after it.
    """

    text: str
    id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def is_marker(self) -> bool:
        """False for white space and single characters: ordinary text that happens to be listed."""
        return len(self.text) > 1 and not self.text.replace("▁", " ").isspace()


def check_added_tokens(texts: Collection[str]) -> None:
    """Raise `ModelLoadError` for tokens that are no Unicode, and for more or longer ones than any
    vocabulary has."""
    if len(texts) > MAX_ADDED_TOKENS:
        raise ModelLoadError(
            f"the tokenizer has {len(texts):,} added tokens, over {MAX_ADDED_TOKENS:,}; "
            "download it again"
        )
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ModelLoadError(
                f"the added token {text!r} holds half of a surrogate pair, which is not valid "
                "Unicode; download the tokenizer again"
            ) from None
    longest = max(map(len, texts), default=0)
    if longest > MAX_TOKEN_CHARS:
        raise ModelLoadError(
            f"the tokenizer has an added token of {longest:,} characters, over "
            f"{MAX_TOKEN_CHARS}; download it again"
        )


class SpecialTokens:
    """The markers of one vocabulary: looks them up, finds them in a text, breaks forged ones.

    Raises `ModelLoadError` for more or longer tokens than any vocabulary has.
    """

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        markers = [token for token in tokens if token.is_marker]
        check_added_tokens([token.text for token in markers])
        self.by_text = {token.text: token for token in markers}
        self.by_id = {token.id: token for token in markers}
        self._all = _Finder(markers)
        self._control = _Finder([token for token in markers if token.special])

    def split(self, text: str) -> Rendered:
        """Cut a text at the special tokens written in it."""
        rendered: Rendered = []
        position = 0
        for start, end, token in self._all.find(text):
            if start > position:
                rendered.append(text[position:start])
            rendered.append(Special(token))
            position = end
        if position < len(text):
            rendered.append(text[position:])
        return rendered

    def shield(self, text: str, sentinel: str, *, control_only: bool) -> str:
        """Put `sentinel` into whatever in `text` is a special token or could become part of one.

        Removing every sentinel gives `text` back. With `control_only`, tokens that are not flagged
        special stay whole.
        """
        finder = self._control if control_only else self._all
        pieces: list[str] = []
        position = 0
        for start, end, token in finder.find(text):
            start = text.index(token, start, end)
            pieces += text[position:start], sentinel.join(token), sentinel
            position = start + len(token)
        pieces.append(text[position:])
        return finder.shield_edges("".join(pieces), sentinel)


class _Finder:
    """Finds tokens in a text, leftmost and longest first, in linear time."""

    def __init__(self, tokens: list[AddedToken]) -> None:
        # Sorted rather than cut into all their prefixes, which takes the square of their length.
        self._forward = sorted(token.text for token in tokens)
        self._backward = sorted(token.text[::-1] for token in tokens)
        self._longest = max((len(token.text) for token in tokens), default=0)
        # A tokenizer without vocabulary drops ordinary text and yields only the added tokens.
        self._matcher = tokenizers.Tokenizer(BPE())
        self._matcher.add_tokens(
            [
                tokenizers.AddedToken(
                    token.text,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    single_word=token.single_word,
                    normalized=False,
                )
                for token in tokens
            ]
        )
        self._texts = {self._matcher.token_to_id(token.text): token.text for token in tokens}

    def find(self, text: str) -> list[tuple[int, int, str]]:
        """(start, end, token) of each occurrence; the span includes swallowed white space."""
        if not self._texts:
            return []
        found = self._matcher.encode(text, add_special_tokens=False)
        return [
            (start, end, self._texts[token_id])
            for token_id, (start, end) in zip(found.ids, found.offsets, strict=True)
        ]

    def shield_edges(self, text: str, sentinel: str) -> str:
        """Guard an end that begins a token, and a start that ends one, against their neighbours."""
        body = text.rstrip()
        lengths = range(1, min(self._longest, len(body) + 1))
        if any(_begins_one(self._forward, body[-n:]) for n in lengths):
            text = body + sentinel + text[len(body) :]
        body = text.lstrip()
        if any(_begins_one(self._backward, body[:n][::-1]) for n in lengths):
            text = text[: len(text) - len(body)] + sentinel + body
        return text


def _begins_one(ordered: list[str], part: str) -> bool:
    """Whether a longer string among `ordered` starts with `part`."""
    place = bisect_right(ordered, part)
    return place < len(ordered) and ordered[place].startswith(part)
