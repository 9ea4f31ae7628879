"""A folder's `tokenizer.model` (sentencepiece) as tokenizer parts.

Knows which ids to believe: those of the vocabulary itself, before any JSON file beside it.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from tokenizers import Tokenizer

from chatserve.errors import ModelLoadError
from chatserve.models.sentencepiece import (
    PieceType,
    Vocabulary,
    build_encoder,
    piece_bytes,
    read_vocabulary,
    set_dummy_prefix,
)
from chatserve.models.special_tokens import AddedToken
from chatserve.models.tokenizer_parts import PAD_TOKENS, TokenizerParts, choose_eos_ids
from chatserve.models.tokenizer_settings import TOKEN_NAMES, TokenizerSettings

logger = logging.getLogger(__name__)

MAX_BYTES = 64 << 20


def read_tokenizer_model(path: Path, settings: TokenizerSettings) -> TokenizerParts:
    """Raises `ModelLoadError` when the file is damaged or of a kind that is not supported."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ModelLoadError(f"{path}: {size:,} bytes, over the limit of {MAX_BYTES:,}")
        vocabulary = read_vocabulary(path.read_bytes())
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from error
    except ModelLoadError as error:
        raise ModelLoadError(f"{path.parent}: {error.message}") from error
    if settings.tokenizer_config.get("add_prefix_space") is False:
        vocabulary = dataclasses.replace(vocabulary, dummy_prefix=False)
    return build_parts(vocabulary, settings)


def build_parts(vocabulary: Vocabulary, settings: TokenizerSettings) -> TokenizerParts:
    """Put a sentencepiece vocabulary and its settings together."""
    vocabulary, added = _with_added(vocabulary, settings.further_tokens())
    first = build_encoder(vocabulary, dummy_prefix=vocabulary.dummy_prefix)
    later = first
    if vocabulary.dummy_prefix and not settings.is_legacy:
        later = Tokenizer(first.model)
        set_dummy_prefix(later, False)
    ids = {token.text: token.id for token in added}
    named = {name: ids.get(settings.named_token(name) or "") for name in TOKEN_NAMES}
    vocab_size = max(len(vocabulary.pieces), *(token.id + 1 for token in added), 1)
    # The first releases name </s> as bos, eos and unk at once.
    bos_id = named["bos_token"]
    if bos_id is None or bos_id in (vocabulary.eos_id, vocabulary.unk_id):
        bos_id = vocabulary.bos_id
    own_eos = [vocabulary.eos_id, named["eos_token"]]
    texts = {token.id: token.text for token in added}
    names = {
        "bos_token": texts.get(-1 if bos_id is None else bos_id),
        "eos_token": texts.get(next((i for i in reversed(own_eos) if i is not None), -1)),
        "unk_token": texts.get(-1 if vocabulary.unk_id is None else vocabulary.unk_id),
        "pad_token": settings.named_token("pad_token"),
    }
    return TokenizerParts(
        first=first,
        later=later,
        piece_bytes=piece_bytes,
        added=tuple(added),
        vocab_size=vocab_size,
        bos_id=bos_id,
        eos_ids=choose_eos_ids(own_eos, settings.eos_candidates(), added, vocab_size),
        adds_bos=settings.adds_bos is not False,
        strips_leading_space=vocabulary.dummy_prefix,
        names={name: text for name, text in names.items() if text},
    )


def _with_added(
    vocabulary: Vocabulary, further: list[AddedToken]
) -> tuple[Vocabulary, list[AddedToken]]:
    """All added tokens; pieces that are one of them become unreachable for ordinary text."""
    types = list(vocabulary.types)
    texts: dict[str, AddedToken] = {}
    for i, piece in enumerate(vocabulary.pieces):
        if types[i] in (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.USER_DEFINED):
            special = types[i] != PieceType.USER_DEFINED
            texts.setdefault(piece, AddedToken(piece, i, special))
    for token in further:
        if token.id < len(types):
            if vocabulary.pieces[token.id] != token.text:
                logger.warning(
                    "ignored the added token %r: its id %d is %r in the vocabulary",
                    token.text, token.id, vocabulary.pieces[token.id],
                )  # fmt: skip
                continue
            if token.is_marker and types[token.id] == PieceType.NORMAL:
                types[token.id] = PieceType.CONTROL if token.special else PieceType.USER_DEFINED
        special = token.special or token.text in PAD_TOKENS
        known = texts.get(token.text)
        if known is None or known.id == token.id:
            special = special or (known is not None and known.special)
            texts[token.text] = dataclasses.replace(token, special=special)
    return dataclasses.replace(vocabulary, types=types), list(texts.values())
