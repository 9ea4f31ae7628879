"""The vocabulary of a `tokenizer.model`: its protobuf, and an encoder that gives the same ids.

Knows no file names, no special-token settings and no templates. Only BPE models without text
normalisation are read, which is what the LLaMA family uses; others need their tokenizer.json.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE

from chatserve.errors import ModelLoadError

MAX_PIECES = 1 << 20
MAX_PIECE_LEN = 512
MAX_MERGES = 1 << 21  # vocabularies in use have about two per piece
WORD_START = "▁"
# A noncharacter in front keeps this out of reach: BPE only ever builds what its merges build.
_UNKNOWN = "\ufdd0unknown"

_BPE = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class PieceType(enum.IntEnum):
    """`ModelProto.SentencePiece.Type`, and GGUF's `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Pieces by id, with the score and the type of each."""

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    byte_fallback: bool = True
    dummy_prefix: bool = True


def read_vocabulary(data: bytes) -> Vocabulary:
    """Parse a serialised sentencepiece `ModelProto`.

    Raises `ModelLoadError` when it is damaged or needs rules that are not implemented here.
    """
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for field, value in _fields(data):
            if field == 1:
                if len(pieces) == MAX_PIECES:
                    raise ValueError(f"it has more than {MAX_PIECES:,} pieces")
                piece = dict(_fields(value))
                pieces.append(piece.get(1, b"").decode("utf-8"))
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                types.append(piece.get(3, PieceType.NORMAL))
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                normalizer = dict(_fields(value))
    except (ValueError, TypeError, AttributeError, struct.error) as error:
        raise ModelLoadError(f"tokenizer.model is damaged ({error}); fetch it again") from error
    if not pieces:
        raise ModelLoadError("tokenizer.model holds no pieces; fetch it again")
    _check_supported(trainer, normalizer)
    return Vocabulary(
        pieces,
        scores,
        types,
        bos_id=_control_id(trainer, 41, 1, len(pieces)),
        eos_id=_control_id(trainer, 42, 2, len(pieces)),
        unk_id=_control_id(trainer, 40, 0, len(pieces)),
        byte_fallback=bool(trainer.get(35, 0)),
        dummy_prefix=bool(normalizer.get(3, 1)),
    )


def build_encoder(vocabulary: Vocabulary, *, dummy_prefix: bool) -> Tokenizer:
    """An encoder of ordinary text: control and user-defined pieces are out of its reach.

    With `dummy_prefix` a text that is not empty starts with a word-start mark, as sentencepiece's
    own does.
    """
    ids = _reachable(vocabulary)
    normal = {piece: i for piece, i in ids.items() if vocabulary.types[i] != PieceType.BYTE}
    if vocabulary.unk_id is not None:
        ids[_UNKNOWN] = vocabulary.unk_id
    encoder = Tokenizer(
        BPE(
            vocab=ids,
            merges=_merges(normal, vocabulary.scores),
            unk_token=_UNKNOWN if vocabulary.unk_id is not None else None,
            fuse_unk=True,
            byte_fallback=vocabulary.byte_fallback,
        )
    )
    set_dummy_prefix(encoder, dummy_prefix)
    return encoder


def set_dummy_prefix(encoder: Tokenizer, dummy_prefix: bool) -> None:
    """Make `encoder` start every text with a word-start mark, or none."""
    spaces = normalizers.Replace(" ", WORD_START)
    prefix = [normalizers.Prepend(WORD_START)] if dummy_prefix else []
    encoder.normalizer = normalizers.Sequence([*prefix, spaces])


def piece_bytes(piece: str) -> bytes:
    """The UTF-8 text of one piece, for decoding."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes.fromhex(piece[3:5])
        except ValueError:
            pass
    return piece.replace(WORD_START, " ").encode("utf-8")


def _reachable(vocabulary: Vocabulary) -> dict[str, int]:
    ids: dict[str, int] = {}
    for i, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.types, strict=True)):
        if len(piece) > MAX_PIECE_LEN:
            raise ModelLoadError(
                f"piece {i} of the vocabulary is {len(piece):,} characters long, over the limit "
                f"of {MAX_PIECE_LEN}; the tokenizer is damaged"
            )
        if kind == PieceType.USER_DEFINED and not piece.strip(" ▁\t\n\r"):
            raise ModelLoadError(
                f"piece {i} of the vocabulary is user-defined white space, which is not "
                "supported; use the model's Hugging Face folder with its tokenizer.json"
            )
        if kind in (PieceType.NORMAL, PieceType.BYTE):
            ids.setdefault(piece, i)
    return ids


def _merges(ids: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, best score first.

    Splits of one piece have equal rank in sentencepiece, where the leftmost pair wins; scanning
    from the left leaves the longer half on the left, so that split comes first.
    """
    merges = []
    own = {piece: piece for piece in ids}  # one string per piece, however many merges name it
    for piece, _ in sorted(ids.items(), key=lambda item: (-scores[item[1]], item[1])):
        for cut in range(len(piece) - 1, 0, -1):
            left, right = own.get(piece[:cut]), own.get(piece[cut:])
            if left is not None and right is not None:
                merges.append((left, right))
        if len(merges) > MAX_MERGES:
            raise ModelLoadError(
                f"the vocabulary's pieces make each other in more than {MAX_MERGES:,} ways; "
                "the tokenizer is damaged"
            )
    return merges


def _check_supported(trainer: Mapping[int, Any], normalizer: Mapping[int, Any]) -> None:
    problem = None
    if trainer.get(3, 1) != _BPE:
        problem = "is not a BPE model"
    elif trainer.get(24, 0):
        problem = "puts white space at the end of words"
    elif normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(5, 1):
        problem = "rewrites text before it splits it"
    if problem:
        raise ModelLoadError(
            f"tokenizer.model {problem}, which is not supported; put the model's "
            "tokenizer.json beside it"
        )


def _control_id(
    trainer: Mapping[int, Any], field: int, default: int, num_pieces: int
) -> int | None:
    # A negative id (the token is switched off) is stored as a 64-bit two's complement.
    value = trainer.get(field, default)
    return value if isinstance(value, int) and value < num_pieces else None


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one protobuf message: ints, or bytes for everything else."""
    view = memoryview(data)
    position = 0
    while position < len(view):
        key, position = _varint(view, position)
        kind = key & 7
        if kind == _VARINT:
            value, position = _varint(view, position)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            length, position = _varint(view, position)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} at byte {position}")
        if length > len(view) - position:
            raise ValueError(f"a field of {length:,} bytes at byte {position} passes the end")
        yield key >> 3, bytes(view[position : position + length])
        position += length


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(view):
            raise ValueError("it ends in the middle of a number")
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number of more than 10 bytes at byte {position}")
