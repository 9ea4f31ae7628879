"""Byte-level BPE: the alphabet of bytes, and how named vocabularies cut text before merging.

Knows no files. The names are GGUF's `tokenizer.ggml.pre`; the patterns are those of the models' own
tokenizer.json files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from chatserve.errors import ModelLoadError


def _alphabet() -> dict[str, int]:
    """Character of the byte-level alphabet -> byte (Radford et al. 2019, GPT-2's encoder)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF = _alphabet()


def piece_bytes(piece: str) -> bytes:
    """The bytes that a piece of a byte-level vocabulary stands for."""
    try:
        return bytes([_BYTE_OF[character] for character in piece])
    except KeyError:
        return piece.encode("utf-8")


@dataclass(frozen=True)
class Splitting:
    """How a byte-level vocabulary cuts text, and what goes with it."""

    cuts: Callable[[], list[pre_tokenizers.PreTokenizer]]
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Sequence(self.cuts())

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


def splitting(name: str) -> Splitting:
    """The rules of a `tokenizer.ggml.pre` name.

    Raises `ModelLoadError` for names that are not known: another rule would garble the text.
    """
    if name not in _SPLITTINGS:
        raise ModelLoadError(
            f"the GGUF file asks for the pre-tokenizer {name!r}, which is not known here; "
            f"known: {', '.join(_SPLITTINGS)}. Use the model's Hugging Face folder instead"
        )
    return _SPLITTINGS[name]


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_PUNCTUATION}|{_SPACES}"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


def _pattern(*patterns: str) -> Callable[[], list[pre_tokenizers.PreTokenizer]]:
    return lambda: [
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def _gpt2() -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.ByteLevel(add_prefix_space=False)]


def _smollm() -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Digits(individual_digits=True), *_gpt2()]


_GPT2_SPLITTING = Splitting(_gpt2)
_LLAMA3_SPLITTING = Splitting(_pattern(_LLAMA3), ignore_merges=True, adds_bos=True)
_SPLITTINGS = {
    "smollm": Splitting(_smollm),
    "llama-bpe": _LLAMA3_SPLITTING,
    "llama3": _LLAMA3_SPLITTING,
    "llama-v3": _LLAMA3_SPLITTING,
    "qwen2": Splitting(_pattern(_QWEN2), nfc=True),
    "deepseek-r1-qwen": Splitting(_pattern(_QWEN2)),
    "tekken": Splitting(_pattern(_TEKKEN), ignore_merges=True, adds_bos=True),
    "gpt-2": _GPT2_SPLITTING,
    "default": _GPT2_SPLITTING,
}
