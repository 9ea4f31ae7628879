"""What the small JSON files beside a vocabulary say: named tokens, further tokens, stop ids.

Knows no vocabulary format and no templates. Ids are taken from the vocabulary wherever it has an
opinion: many conversions of LLaMA carry wrong ids or blank names in these files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from chatserve.errors import ModelLoadError
from chatserve.models.special_tokens import AddedToken
from chatserve.models.weight_files import read_json

TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class TokenizerSettings:
    """The files as they are; absent ones are empty."""

    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    special_tokens_map: Mapping[str, Any] = field(default_factory=dict)
    added_tokens: Mapping[str, Any] = field(default_factory=dict)
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> TokenizerSettings:
        """Read the files of a folder. Raises `ModelLoadError` for one that is damaged."""
        return cls(
            tokenizer_config=_read_optional(folder, "tokenizer_config.json"),
            special_tokens_map=_read_optional(folder, "special_tokens_map.json"),
            added_tokens=_read_optional(folder, "added_tokens.json"),
            generation_config=_read_optional(folder, "generation_config.json"),
            config=_read_optional(folder, "config.json"),
        )

    @property
    def is_legacy(self) -> bool:
        """Whether every text run after a special token starts a word; so when the key is absent."""
        return self.tokenizer_config.get("legacy") is not False

    @property
    def adds_bos(self) -> bool | None:
        """Whether prompts start with BOS; None leaves it to the vocabulary.

        LLaMA's tokenizer classes do when the key is absent, as transformers up to version 4 has it;
        version 5 forgets it.
        """
        value = self.tokenizer_config.get("add_bos_token")
        if isinstance(value, bool):
            return value
        is_llama = str(self.tokenizer_config.get("tokenizer_class")).startswith("LlamaTokenizer")
        return True if is_llama else None

    @property
    def adds_eos(self) -> bool | None:
        """Whether whole texts, but not prompts, end with EOS; None leaves it to the vocabulary."""
        value = self.tokenizer_config.get("add_eos_token")
        return value if isinstance(value, bool) else None

    def named_token(self, name: str) -> str | None:
        """The text of `bos_token` and its like; None when absent or blank."""
        for source in (self.tokenizer_config, self.special_tokens_map):
            if text := token_text(source.get(name)):
                return text
        return None

    def blank_names(self) -> list[str]:
        """`bos_token` and its like that are there and empty, as in decapoda's conversions."""
        return [
            name
            for name in ("bos_token", "eos_token", "unk_token")
            if self.named_token(name) is None
            and any(
                _is_blank(source.get(name))
                for source in (self.tokenizer_config, self.special_tokens_map)
            )
        ]

    def named_id(self, name: str) -> int | None:
        """`bos_token_id` and its like from config.json, when it is a single number."""
        value = self.config.get(f"{name}_id")
        return value if _is_id(value) else None

    def further_tokens(self) -> list[AddedToken]:
        """Tokens beside the vocabulary. Raises `ModelLoadError` for an id that is not a number."""
        special = {self.named_token(name) for name in TOKEN_NAMES}
        for source in (self.tokenizer_config, self.special_tokens_map):
            for key in ("additional_special_tokens", "extra_special_tokens"):
                special.update(map(token_text, _list(source, key)))
        tokens = {
            text: AddedToken(text, _checked_id(token_id, text), text in special)
            for text, token_id in self.added_tokens.items()
            if text
        }
        decoder = self.tokenizer_config.get("added_tokens_decoder")
        for token_id, entry in (decoder if isinstance(decoder, dict) else {}).items():
            if isinstance(entry, dict) and (text := token_text(entry)):
                tokens[text] = added_token(entry, _checked_id(token_id, text))
        return list(tokens.values())

    def eos_candidates(self) -> list[int]:
        """End-of-sequence ids that generation_config.json and config.json name."""
        ids: list[int] = []
        for source in (self.generation_config, self.config):
            value = source.get("eos_token_id")
            ids += filter(_is_id, value if isinstance(value, list) else [value])
        return ids


def added_token(entry: Mapping[str, Any], token_id: int) -> AddedToken:
    """An `added_tokens` entry of tokenizer.json or tokenizer_config.json."""
    return AddedToken(
        text=entry["content"],
        id=token_id,
        special=bool(entry.get("special")),
        lstrip=bool(entry.get("lstrip")),
        rstrip=bool(entry.get("rstrip")),
        single_word=bool(entry.get("single_word")),
    )


def token_text(value: Any) -> str | None:
    """A token given as text or as `{"content": text}`; None for anything else and for blanks."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _is_blank(value: Any) -> bool:
    return value == "" or (isinstance(value, dict) and value.get("content") == "")


def _read_optional(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder, name) if os.path.lexists(folder / name) else {}


def _list(source: Mapping[str, Any], key: str) -> list[Any]:
    value = source.get(key)
    return value if isinstance(value, list) else []


def _is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _checked_id(value: Any, text: str) -> int:
    if isinstance(value, str) and value.isdecimal() and len(value) <= 10:
        value = int(value)
    if not _is_id(value) or value >= 1 << 31:
        raise ModelLoadError(
            f"the added token {text!r} has the id {str(value)[:40]!r}, which is no number"
        )
    return value
