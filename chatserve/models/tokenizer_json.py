"""A folder's `tokenizer.json` as tokenizer parts: its special tokens are taken out of its reach.

Everything else of the file (normaliser, splitting, merges) is used as it is.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from chatserve.errors import ModelLoadError
from chatserve.models import byte_level, sentencepiece, wordpiece
from chatserve.models.special_tokens import AddedToken, check_added_tokens
from chatserve.models.tokenizer_parts import TokenizerParts, choose_eos_ids, damage_refused
from chatserve.models.tokenizer_settings import (
    TOKEN_NAMES,
    TokenizerSettings,
    added_token,
)
from chatserve.models.weight_files import read_json

_SENTENCEPIECE_DECODERS = frozenset(
    {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip", "Sequence"}
)
_LLAMA_IDS = {"<unk>": 0, "<s>": 1, "</s>": 2}
MAX_FILE_BYTES = 64 << 20  # 256,000 pieces and their merges take 35 MB
MAX_DEFINITION_CHARS = 1_000_000
MAX_NORMALIZERS = 16
MAX_GROWTH = 64
# Letters, white space, digits, accents and an emoji: every rule meets something to work on.
_SAMPLE = "Hello,  the world\n\t1234 naïve 中文 🎉 <s>"


def read_tokenizer_json(path: Path, settings: TokenizerSettings) -> TokenizerParts:
    """Raises `ModelLoadError` when the file is damaged or decodes in a way not supported."""
    data = read_json(path.parent, path.name, max_bytes=MAX_FILE_BYTES)
    try:
        with damage_refused("it"):
            return _build_parts(data, settings)
    except ModelLoadError as error:
        raise ModelLoadError(f"{path}: {error.message}") from error


def _build_parts(data: dict[str, Any], settings: TokenizerSettings) -> TokenizerParts:
    _check_definitions(data)
    decoded_by, strips_leading_space = _decoding(data)
    added = _added_tokens(data, settings)
    _take_out(data, [token for token in added if token.is_marker])
    first = _build_encoder(data)
    later = _later_encoder(first, data)
    for encoder in (first, later):
        encoder.encode(_SAMPLE)  # a definition that cannot work shows now, not at a request
    ids = {token.text: token.id for token in added}
    vocab_size = max((token.id + 1 for token in added), default=0)
    vocab_size = max(vocab_size, *(i + 1 for i in first.get_vocab().values()), 1)
    named = {name: _named_id(name, settings, ids, first) for name in TOKEN_NAMES}
    texts = {token.id: token.text for token in added}
    bos_id = named["bos_token"]
    adds_bos = settings.adds_bos
    if adds_bos is None:
        adds_bos = first.encode("a").ids[:1] == [bos_id]
    before, after = _frame(first)
    if settings.adds_eos is not None:
        eos_id = named["eos_token"]
        after = (eos_id,) if settings.adds_eos and eos_id is not None else ()
    names = {
        name: texts.get(-1 if token_id is None else token_id) or settings.named_token(name)
        for name, token_id in named.items()
    }
    return TokenizerParts(
        first=first,
        later=later,
        piece_bytes=decoded_by,
        added=tuple(added),
        vocab_size=vocab_size,
        bos_id=bos_id,
        eos_ids=choose_eos_ids([named["eos_token"]], settings.eos_candidates(), added, vocab_size),
        adds_bos=adds_bos,
        strips_leading_space=strips_leading_space,
        names={name: text for name, text in names.items() if text},
        frame=(before, after),
    )


def _frame(encoder: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts before and behind a text."""
    bare = encoder.encode("a", add_special_tokens=False).ids
    whole = encoder.encode("a").ids
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return (), ()


def _added_tokens(data: Mapping[str, Any], settings: TokenizerSettings) -> list[AddedToken]:
    """The file's own list, then what only the settings know; special if either says so."""
    tokens = {
        entry["content"]: added_token(entry, int(entry["id"]))
        for entry in data.get("added_tokens") or []
        if entry["content"]
    }
    for token in settings.further_tokens():
        known = tokens.get(token.text)
        if known is None or (token.special and not known.special and known.id == token.id):
            tokens[token.text] = token
    check_added_tokens(tokens)
    return list(tokens.values())


def _check_definitions(data: Mapping[str, Any]) -> None:
    """Bound what the file's rules may cost: their size, their number, how far a text grows."""
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        num_chars = len(json.dumps(data.get(key)))
        if num_chars > MAX_DEFINITION_CHARS:
            raise ModelLoadError(
                f"its {key} has {num_chars:,} characters, over {MAX_DEFINITION_CHARS:,}"
            )
    normalizers = list(_walk(data.get("normalizer")))
    if len(normalizers) > MAX_NORMALIZERS:
        raise ModelLoadError(f"it has {len(normalizers)} normalizers, over {MAX_NORMALIZERS}")
    growth = 1
    for part in normalizers:
        added = part.get("content", part.get("prepend"))
        growth *= max(1, len(added)) if isinstance(added, str) else 1
    if growth > MAX_GROWTH:
        raise ModelLoadError(f"its normalizers make a text up to {growth:,} times longer")


def _named_id(
    name: str, settings: TokenizerSettings, ids: Mapping[str, int], encoder: Tokenizer
) -> int | None:
    """The id of `bos_token` and its like: by its text, else as config.json has it, else LLaMA's."""
    text = settings.named_token(name)
    if name == "bos_token" and text == "</s>" and _LLAMA_IDS.items() <= ids.items():
        return ids["<s>"]  # the first Vicuna names </s> as bos, eos and unk at once
    if text is not None:
        token_id = ids.get(text)
        return encoder.token_to_id(text) if token_id is None else token_id
    usual = ids.get({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}.get(name, ""))
    return settings.named_id(name) if usual is None else usual


def _take_out(data: dict[str, Any], markers: list[AddedToken]) -> None:
    """Put the markers out of reach of ordinary text, their ids left as they are.

    White space among the added tokens stays: it is text that the file wants matched as a whole.
    """
    texts = {token.text for token in markers}
    data["added_tokens"] = [
        entry for entry in data.get("added_tokens") or [] if entry["content"] not in texts
    ]
    data["truncation"] = data["padding"] = None
    model = data["model"]
    # Nobody can type a name that is drawn anew at each start.
    hidden = {text: f"\ufdd0{secrets.token_hex(16)}" for text in texts}
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {hidden.get(piece, piece): i for piece, i in vocab.items()}
        for entry in data["added_tokens"]:
            # The library gives a token outside the vocabulary the next free id instead of its own.
            model["vocab"].setdefault(entry["content"], int(entry["id"]))
        hidden = {text: name for text, name in hidden.items() if text in vocab}
    else:
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    if hidden and "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not _makes(pair, hidden)]


def _makes(pair: str | list[str], texts: Mapping[str, str]) -> bool:
    left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
    return left + right in texts or left in texts or right in texts


def _build_encoder(data: Mapping[str, Any]) -> Tokenizer:
    encoder: Tokenizer = Tokenizer.from_str(json.dumps(data))
    return encoder


def _later_encoder(first: Tokenizer, data: Mapping[str, Any]) -> Tokenizer:
    """The encoder of text that does not start the prompt."""
    splitting = json.loads(json.dumps(data.get("pre_tokenizer")))
    once = [part for part in _walk(splitting) if part.get("prepend_scheme") == "first"]
    if not once:
        return first
    for part in once:
        part["prepend_scheme"] = "never"
    shell = Tokenizer.from_str(
        json.dumps(
            {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": splitting}
        )
    )
    later = Tokenizer(first.model)
    if first.normalizer is not None:
        later.normalizer = first.normalizer
    later.pre_tokenizer = shell.pre_tokenizer
    return later


def _decoding(data: Mapping[str, Any]) -> tuple[Callable[[str], bytes], bool]:
    """How a piece becomes bytes, and whether an answer's first space is not text."""
    parts = list(_walk(data.get("decoder")))
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds or any(
        part.get("type") == "ByteLevel" for part in _walk(data.get("pre_tokenizer"))
    ):
        return byte_level.piece_bytes, False
    if kinds == {"WordPiece"}:
        return wordpiece.reader(parts[0].get("prefix")), True
    if kinds and kinds <= _SENTENCEPIECE_DECODERS and kinds & {"Metaspace", "Replace"}:
        strips = any(
            (part.get("type") == "Strip" and part.get("start", 0) > 0)
            or (part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never")
            for part in parts
        )
        return sentencepiece.piece_bytes, strips
    names = ", ".join(sorted(map(str, kinds))) or "none"
    raise ModelLoadError(
        f"its decoder ({names}) is not supported; byte-level, sentencepiece and "
        "WordPiece decoders are"
    )


def _walk(part: Any) -> Iterator[dict[str, Any]]:
    """A component of the file and the components inside it."""
    if not isinstance(part, dict):
        return
    yield part
    for key in ("decoders", "pretokenizers", "normalizers"):
        for inner in part.get(key) or []:
            yield from _walk(inner)
