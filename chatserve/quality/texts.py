"""What is read to measure quality: five short texts of our own, or a file of the user's.

Knows tokens and windows; no network.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from chatserve.errors import ModelLoadError, UsageError
from chatserve.models.tokenizer import Tokenizer

SHIPPED = Path(__file__).parent / "texts"
SHIPPED_NAME = "shipped"
WINDOW = 512
"""Tokens that are read with one another; a longer text is cut."""
MIN_TOKENS = 128
"""Fewer say nothing about the worst hundredth."""
_MAX_BYTES_PER_TOKEN = 64  # on average; what is beyond is not read from disk


@dataclass(frozen=True)
class TokenText:
    """Windows of token ids, each read from its own beginning; `num_left` tokens are not read."""

    name: str
    windows: tuple[tuple[int, ...], ...]
    num_left: int = 0

    @property
    def num_positions(self) -> int:
        return sum(map(len, self.windows))

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(array("i", [len(window), *window]).tobytes())
        return digest.hexdigest()


def read_text(
    tokenizer: Tokenizer, file: Path | None, *, num_tokens: int, window: int, vocab_size: int
) -> TokenText:
    """The shipped texts, or `file`; at most `num_tokens`, cut into windows.

    Raises `UsageError` for a file that cannot be read or is too short, `ModelLoadError` when the
    tokenizer's ids are not the model's.
    """
    if file is None:
        name = SHIPPED_NAME
        texts = [path.read_text("utf-8").strip() for path in sorted(SHIPPED.glob("*.txt"))]
    else:
        name, texts = file.name, [_read_file(file, num_tokens * _MAX_BYTES_PER_TOKEN)]
    windows = [part for text in texts for part in _windows(tokenizer, text, window)]
    num_all = sum(map(len, windows))
    windows = list(_first(windows, num_tokens))
    num_read = sum(map(len, windows))
    if num_read < MIN_TOKENS:
        what = f"{file} has {num_all:,} tokens" if file else f"{num_read:,} tokens were asked for"
        raise UsageError(f"{what}, too few to measure anything; at least {MIN_TOKENS} are needed")
    largest = max(map(max, windows))
    if largest >= vocab_size:
        raise ModelLoadError(
            f"the tokenizer gives id {largest:,}, the model has {vocab_size:,} rows; tokenizer and "
            "weights are of different models"
        )
    return TokenText(name, tuple(map(tuple, windows)), num_all - num_read)


def _windows(tokenizer: Tokenizer, text: str, window: int) -> Iterator[Sequence[int]]:
    """Each begins as a prompt does; special tokens written in the text are meant."""
    ids = tokenizer.encode(tokenizer.special_tokens.split(text), add_bos=False)
    first = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    if ids[: len(first)] == first:
        first = []
    step = max(1, window - len(first))
    for start in range(0, len(ids), step):
        yield [*first, *ids[start : start + step]]


def _first(windows: Sequence[Sequence[int]], num_tokens: int) -> Iterator[Sequence[int]]:
    """So many tokens in all. A single token at an end predicts nothing, and is left."""
    for window in windows:
        part = window[:num_tokens]
        num_tokens -= len(part)
        if len(part) > 1:
            yield part


def _read_file(file: Path, max_bytes: int) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except OSError as error:
        raise UsageError(f"--text {file}: {error.strerror}; give a UTF-8 text file") from error
    if len(data) > max_bytes:  # and the character at the cut may be a part of one
        data = data[:max_bytes].rsplit(b"\n", 1)[0]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--text {file}: byte {error.start:,} is not UTF-8; give a UTF-8 text file"
        ) from error
    if "\0" in text:
        raise UsageError(f"--text {file}: holds zero bytes, as binary files do; give a text file")
    return text.strip()
