"""Text to token ids and ids to bytes. Knows no roles and no templates.

A prompt is a list of special tokens and ordinary text. Ordinary text is encoded by a vocabulary
from which the special tokens have been taken away, so whatever it says, it never yields one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chatserve.errors import GenerationFailed, InvalidRequest, ModelLoadError
from chatserve.models.remote_code import warn_of_code
from chatserve.models.special_tokens import Rendered, Special, SpecialTokens
from chatserve.models.tokenizer_gguf import read_gguf_tokenizer
from chatserve.models.tokenizer_json import read_tokenizer_json
from chatserve.models.tokenizer_model import read_tokenizer_model
from chatserve.models.tokenizer_parts import PAD_TOKENS, TokenizerParts
from chatserve.models.tokenizer_settings import TokenizerSettings
from chatserve.models.weight_files import member

__all__ = ["Rendered", "Special", "Tokenizer", "load_tokenizer"]

logger = logging.getLogger(__name__)


class Tokenizer:
    """One vocabulary and its special tokens.

    special_ids: text -> id of every token that is matched as a whole. forbidden_ids: padding, which
    must never be sampled. adds_bos: whether a prompt starts with `bos_id` by this model's custom.
    strips_leading_space: the first piece of an answer carries a word-start mark that is not text.
    frame: the ids that belong before and behind a whole text, which is not continued.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self.special_tokens = SpecialTokens(parts.added)
        self.special_ids: Mapping[str, int] = {
            text: token.id for text, token in self.special_tokens.by_text.items()
        }
        self.names = parts.names
        self.vocab_size = parts.vocab_size
        self.bos_id = parts.bos_id
        self.eos_ids = parts.eos_ids
        self.adds_bos = parts.adds_bos and parts.bos_id is not None
        self.strips_leading_space = parts.strips_leading_space
        self.frame = parts.frame
        padding = {self.special_ids[text] for text in PAD_TOKENS if text in self.special_ids}
        self.forbidden_ids = frozenset(padding) - parts.eos_ids
        self._first = parts.first
        self._later = parts.later
        self._piece_bytes = parts.piece_bytes
        self._bytes_of = {
            token.id: b"" if token.special else token.text.encode("utf-8")
            for token in self.special_tokens.by_id.values()
        }

    def encode(self, rendered: Rendered | str, *, add_bos: bool) -> list[int]:
        """Token ids of a prompt.

        Plain `str` parts never yield a special id. With `add_bos` the prompt starts with `bos_id`,
        once, if there is one. Raises `InvalidRequest` for a special token that the vocabulary lacks
        and for text that is not Unicode (a lone surrogate).
        """
        parts = [rendered] if isinstance(rendered, str) else rendered
        ids: list[int] = []
        if add_bos and self.bos_id is not None and not self._starts_with_bos(parts):
            ids.append(self.bos_id)
        encoder = self._first
        for part in self._joined(parts):
            if isinstance(part, Special):
                ids.append(self._special_id(part))
            else:
                ids += encode_text(encoder, part)
            encoder = self._later
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token; empty for control tokens and for ids without a token.

        The bytes of an answer's tokens, joined, are its text; one token may be part of a character.
        """
        known = self._bytes_of.get(token_id)
        if known is None:
            piece = self._first.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
            known = b"" if piece is None else self._piece_bytes(piece)
            self._bytes_of[token_id] = known
        return known

    def name_of(self, token_id: int) -> str | None:
        """What a control token is called; None for text and for ids without a token."""
        token = self.special_tokens.by_id.get(token_id)
        return token.text if token is not None and token.special else None

    def piece(self, token_id: int) -> str:
        """How the vocabulary writes one token; empty for an id without a token."""
        special = self.special_tokens.by_id.get(token_id)
        if special is not None:
            return special.text
        is_known = 0 <= token_id < self.vocab_size
        return (self._first.id_to_token(token_id) or "") if is_known else ""

    def decode(self, ids: Iterable[int], *, shows_special: bool = False) -> str:
        """The text of whole ids; bytes that are no character become U+FFFD.

        Control tokens are no text unless `shows_special` wants them as they are written.
        """
        ids, start = list(ids), ""
        if shows_special and ids and ids[0] == self.bos_id:
            start = self.piece(ids.pop(0))
        bytes_of = self._shown_bytes if shows_special else self.token_bytes
        text = b"".join(map(bytes_of, ids)).decode("utf-8", "replace")
        return start + (text.removeprefix(" ") if self.strips_leading_space else text)

    def _shown_bytes(self, token_id: int) -> bytes:
        special = self.special_tokens.by_id.get(token_id)
        return self.token_bytes(token_id) if special is None else special.text.encode()

    def _starts_with_bos(self, parts: Rendered) -> bool:
        first = next((part for part in parts if part), "")
        return isinstance(first, Special) and self.special_ids.get(first) == self.bos_id

    def _special_id(self, token: Special) -> int:
        try:
            return self.special_ids[token]
        except KeyError:
            raise InvalidRequest(f"this model has no special token {str(token)!r}") from None

    def _joined(self, parts: Rendered) -> Rendered:
        """Neighbouring texts joined, white space given to the special tokens that swallow it."""
        joined: Rendered = []
        text: list[str] = []
        swallow = False
        for part in [*parts, Special("")]:
            if not isinstance(part, Special):
                text.append(part)
                continue
            token = self.special_tokens.by_text.get(part)
            run = "".join(text)
            run = run.lstrip() if swallow else run
            run = run.rstrip() if token is not None and token.lstrip else run
            joined += [run] if run else []
            joined += [part] if part else []
            text.clear()
            swallow = token is not None and token.rstrip
        return joined


def encode_text(encoder: Any, text: str) -> list[int]:
    """Ids of ordinary text. Other threads run meanwhile: only a batch is encoded without the GIL.

    Raises `InvalidRequest` for a lone surrogate, `GenerationFailed` where the vocabulary's own
    rules give up.
    """
    try:
        [encoding] = encoder.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)
    except (TypeError, UnicodeEncodeError):
        raise InvalidRequest(
            "the text holds half of a surrogate pair, which is not valid Unicode"
        ) from None
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    # The library's panics are no Exception: a pattern that backtracks too long is one.
    except BaseException as error:
        raise GenerationFailed(
            f"this model's tokenizer failed on the text ({error}); send another text"
        ) from error


def load_tokenizer(path: Path, metadata: Mapping[str, Any] | None = None) -> Tokenizer:
    """The tokenizer of a model folder (tokenizer.json, else tokenizer.model) or a `.gguf` file.

    metadata: of the `.gguf` file, when it has been read already. Raises `ModelLoadError` when there
    is no tokenizer or it is damaged.
    """
    if not path.is_dir():
        return Tokenizer(read_gguf_tokenizer(_metadata(path) if metadata is None else metadata))
    settings = TokenizerSettings.read(path)
    if "auto_map" not in settings.config:  # of that one the checkpoint has told
        warn_of_code(path, settings.tokenizer_config)
    if (path / "tokenizer.json").exists():
        parts = read_tokenizer_json(member(path, "tokenizer.json"), settings)
    elif (path / "tokenizer.model").exists():
        parts = read_tokenizer_model(member(path, "tokenizer.model"), settings)
    else:
        raise ModelLoadError(
            f"{path}: no tokenizer: neither tokenizer.json nor tokenizer.model; "
            "copy it from the model's own repository"
        )
    _tell_of_blanks(path, settings, parts)
    return Tokenizer(parts)


def _tell_of_blanks(path: Path, settings: TokenizerSettings, parts: TokenizerParts) -> None:
    """Names that a conversion left empty are read from the vocabulary, if it has them."""
    blank = settings.blank_names()
    if not blank:
        return
    if "eos_token" in blank and not parts.eos_ids:
        raise ModelLoadError(
            f"{path}: its eos_token is blank and its vocabulary names none, so no answer would end;"
            " copy the tokenizer from the model's own repository"
        )
    logger.warning(
        "%s: %s blank (a broken conversion); taken from the vocabulary: bos %s, eos %s; for good: "
        "chatserve repair %s TARGET",
        path, " and ".join(blank) + (" are" if len(blank) > 1 else " is"),
        parts.bos_id, ", ".join(map(str, sorted(parts.eos_ids))), path,
    )  # fmt: skip


def _metadata(path: Path) -> Mapping[str, Any]:
    # Here because only this way to a tokenizer needs torch, which the GGUF reader imports.
    from chatserve.models.gguf_parts import open_gguf

    file = open_gguf(path)
    file.close()
    return file.metadata
