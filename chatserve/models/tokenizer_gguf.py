"""The tokenizer in a GGUF file's metadata as tokenizer parts.

Knows the `tokenizer.*` keys and no file. Source of keys: docs/gguf.md of ggml; defaults are those
of llama.cpp.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers.models import BPE

from chatserve.errors import ModelLoadError
from chatserve.models import byte_level, sentencepiece
from chatserve.models.sentencepiece import PieceType, Vocabulary
from chatserve.models.special_tokens import AddedToken
from chatserve.models.tokenizer_parts import TokenizerParts, choose_eos_ids, damage_refused

logger = logging.getLogger(__name__)

_KEY = "tokenizer.ggml."


def read_gguf_tokenizer(metadata: Mapping[str, Any]) -> TokenizerParts:
    """Raises `ModelLoadError` when it is missing, damaged or of a kind that is not supported."""
    kind = metadata.get(f"{_KEY}model")
    if kind is None:
        raise ModelLoadError(
            "the GGUF file holds no tokenizer (tokenizer.ggml.model); convert the model again"
        )
    if kind not in ("llama", "gpt2"):
        raise ModelLoadError(
            f"the GGUF file's tokenizer {kind!r} is not supported (llama and gpt2 are); "
            "use the model's Hugging Face folder instead"
        )
    vocabulary = _vocabulary(metadata)
    build = _sentencepiece if kind == "llama" else _gpt2
    with damage_refused("the tokenizer in the GGUF file"):
        return build(vocabulary, metadata)


def _sentencepiece(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> TokenizerParts:
    prefix = metadata.get(f"{_KEY}add_space_prefix", True) is not False
    encoder = sentencepiece.build_encoder(vocabulary, dummy_prefix=prefix)
    return _parts(vocabulary, metadata, encoder, prefix=prefix, adds_bos=True)


def _gpt2(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> TokenizerParts:
    rules = byte_level.splitting(metadata.get(f"{_KEY}pre", "default"))
    added = _added(vocabulary)
    markers = {token.text for token in added if token.is_marker}
    ids: dict[str, int] = {}
    for i, piece in enumerate(vocabulary.pieces):
        if piece not in markers:
            ids.setdefault(piece, i)
    encoder = tokenizers.Tokenizer(
        BPE(vocab=ids, merges=_merges(metadata, markers), ignore_merges=rules.ignore_merges)
    )
    encoder.pre_tokenizer = rules.pre_tokenizer()
    if normalizer := rules.normalizer():
        encoder.normalizer = normalizer
    encoder.add_tokens(
        [tokenizers.AddedToken(t.text, normalized=False) for t in added if not t.is_marker]
    )
    return _parts(vocabulary, metadata, encoder, prefix=False, adds_bos=rules.adds_bos)


def _parts(
    vocabulary: Vocabulary,
    metadata: Mapping[str, Any],
    encoder: tokenizers.Tokenizer,
    *,
    prefix: bool,
    adds_bos: bool,
) -> TokenizerParts:
    added = _added(vocabulary)
    vocab_size = len(vocabulary.pieces)
    is_llama = metadata[f"{_KEY}model"] == "llama"
    ends = [_token_id(metadata, f"{name}_token_id", vocab_size) for name in ("eot", "eom")]
    names = {
        "bos_token": vocabulary.bos_id,
        "eos_token": vocabulary.eos_id,
        "unk_token": vocabulary.unk_id,
        "pad_token": _token_id(metadata, "padding_token_id", vocab_size),
    }
    return TokenizerParts(
        first=encoder,
        later=encoder,
        piece_bytes=sentencepiece.piece_bytes if is_llama else byte_level.piece_bytes,
        added=tuple(added),
        vocab_size=vocab_size,
        bos_id=vocabulary.bos_id,
        eos_ids=choose_eos_ids(
            [vocabulary.eos_id], [i for i in ends if i is not None], added, vocab_size
        ),
        adds_bos=bool(metadata.get(f"{_KEY}add_bos_token", adds_bos)),
        strips_leading_space=prefix,
        names={name: vocabulary.pieces[i] for name, i in names.items() if i is not None},
    )


def _vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    pieces = _strings(metadata, "tokens")
    is_llama = metadata[f"{_KEY}model"] == "llama"
    vocabulary = Vocabulary(
        pieces=pieces,
        scores=_numbers(metadata, "scores", len(pieces)) if is_llama else [0.0] * len(pieces),
        types=_numbers(metadata, "token_type", len(pieces)),
        bos_id=_token_id(metadata, "bos_token_id", len(pieces), 1 if is_llama else None),
        eos_id=_token_id(metadata, "eos_token_id", len(pieces), 2 if is_llama else None),
        unk_id=_token_id(metadata, "unknown_token_id", len(pieces), 0 if is_llama else None),
    )
    # Some converters left <s> and </s> among the ordinary pieces.
    types = list(vocabulary.types)
    for i in (vocabulary.bos_id, vocabulary.eos_id):
        if i is not None and pieces[i].startswith("<"):
            types[i] = PieceType.CONTROL
    return dataclasses.replace(vocabulary, types=types)


def _added(vocabulary: Vocabulary) -> list[AddedToken]:
    added: dict[str, AddedToken] = {}
    for i, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.types, strict=True)):
        if piece and kind in (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.USER_DEFINED):
            added.setdefault(piece, AddedToken(piece, i, kind != PieceType.USER_DEFINED))
    return list(added.values())


def _merges(metadata: Mapping[str, Any], markers: set[str]) -> list[tuple[str, str]]:
    """The merges that do not build a marker."""
    merges = []
    for merge in _strings(metadata, "merges"):
        left, space, right = merge.partition(" ")
        if not space or " " in right:
            raise ModelLoadError(
                f"the GGUF file's merge {merge!r} is not a pair; download the file again"
            )
        if not markers or not {left, right, left + right} & markers:
            merges.append((left, right))
    return merges


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    values = metadata.get(f"{_KEY}{name}")
    if not isinstance(values, list) or not values or not isinstance(values[0], str):
        raise ModelLoadError(
            f"the GGUF file's {_KEY}{name} is missing or not a list of texts; "
            "convert or download the model again"
        )
    return values


def _numbers(metadata: Mapping[str, Any], name: str, length: int) -> list[Any]:
    values = metadata.get(f"{_KEY}{name}")
    if not isinstance(values, list) or len(values) != length:
        found = len(values) if isinstance(values, list) else "none"
        raise ModelLoadError(
            f"the GGUF file has {length:,} tokens but {found} values of {_KEY}{name}; "
            "convert or download the model again"
        )
    return values


def _token_id(
    metadata: Mapping[str, Any], name: str, vocab_size: int, default: int | None = None
) -> int | None:
    """The id of a named token, else the default.

    Ids of no token are ignored as in `gguf.py`: converters have written -1 for "none". That of the
    end is not: answers would never stop.
    """
    value = metadata.get(f"{_KEY}{name}")
    if isinstance(value, int) and 0 <= value < vocab_size:
        return value
    if value is not None:
        reason = f"the GGUF file's {_KEY}{name} is {value!r}, outside its {vocab_size:,} tokens"
        if not isinstance(value, int) or name == "eos_token_id":
            raise ModelLoadError(f"{reason}; convert or download the model again")
        logger.warning("%s: ignored", reason)
    return default if default is not None and default < vocab_size else None
