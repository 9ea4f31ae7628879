"""tokenizer.model files give sentencepiece's own ids; damaged and unsupported ones are refused."""

from __future__ import annotations

import functools
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from chatserve.errors import ModelLoadError
from chatserve.models import sentencepiece as sentencepiece_model
from chatserve.models.sentencepiece import piece_bytes, read_vocabulary
from chatserve.models.tokenizer import Tokenizer, load_tokenizer
from chatserve.models.tokenizer_model import build_parts
from chatserve.models.tokenizer_settings import TokenizerSettings
from tests.unit.models.vocabularies import (
    TEXTS,
    llama_model,
    save_json,
    save_llama,
    train_sentencepiece,
)

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
RUNS = st.lists(
    st.sampled_from(["a", "aa", " ", "  ", "▁", "\n", "é", "=-", "the ", "😀", "中", "</s>"]),
    max_size=30,
).map("".join)


@functools.cache
def tokenizer_of(model: bytes) -> Tokenizer:
    return Tokenizer(build_parts(read_vocabulary(model), TokenizerSettings()))


@functools.cache
def judge_of(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def check(model: bytes, text: str) -> None:
    ours, judge = tokenizer_of(model), judge_of(model)
    ids = judge.encode(text)
    assert ours.encode(text, add_bos=False) == ids
    assert ours.decode(ids) == judge.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_llama_texts(text: str) -> None:
    check(llama_model(), text)


@settings(max_examples=300, deadline=None)
@given(UNICODE | RUNS)
def test_llama_any_text(text: str) -> None:
    check(llama_model(), text)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"add_dummy_prefix": False}, {"byte_fallback": False, "vocab_size": 300}],
    ids=["llama-like", "no prefix", "no bytes"],
)
def test_small_models(options: dict[str, Any], text: str) -> None:
    model = train_sentencepiece(**options)
    ours, judge = tokenizer_of(model), judge_of(model)
    assert ours.encode(text, add_bos=False) == judge.encode(text)


@settings(max_examples=300, deadline=None)
@given(UNICODE | RUNS)
def test_small_model_any_text(text: str) -> None:
    check(train_sentencepiece(), text)


def test_long_text_without_spaces_is_encoded() -> None:
    text = "".join(random.Random(0).choices("abcdeé中", k=200_000))
    ids = tokenizer_of(llama_model()).encode(text, add_bos=False)
    assert ids == judge_of(llama_model()).encode(text)


def test_pieces_become_bytes() -> None:
    assert piece_bytes("▁Hello") == b" Hello"
    assert piece_bytes("<0x0A>") == b"\n"
    assert piece_bytes("<0xZZ>") == b"<0xZZ>"
    assert piece_bytes("é") == "é".encode()


def test_streamed_bytes_are_the_text() -> None:
    tokenizer = tokenizer_of(llama_model())
    text = "naïve 😀 𓀀\n\n  中文"
    ids = tokenizer.encode(text, add_bos=True)
    assert b"".join(map(tokenizer.token_bytes, ids)) == f" {text}".encode()
    assert tokenizer.decode(ids) == text
    assert b"\xf0" in [tokenizer.token_bytes(token_id) for token_id in ids]


def test_control_pieces_and_unknown_ids_have_no_bytes() -> None:
    tokenizer = tokenizer_of(llama_model())
    assert [tokenizer.token_bytes(token_id) for token_id in (0, 1, 2)] == [b"", b"", b""]
    assert tokenizer.token_bytes(32000) == b""
    assert tokenizer.token_bytes(-1) == b""


def test_user_defined_pieces_are_markers_not_text() -> None:
    model = train_sentencepiece(user_defined_symbols="<|turn|>")
    tokenizer = tokenizer_of(model)
    token_id = tokenizer.special_ids["<|turn|>"]
    assert judge_of(model).encode("a<|turn|>b").count(token_id) == 1
    assert token_id not in tokenizer.encode("a<|turn|>b", add_bos=False)
    assert tokenizer.token_bytes(token_id) == b"<|turn|>"


def test_no_prefix_by_tokenizer_config(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_llama(tmp_path, tokenizer_config={"add_prefix_space": False}))
    assert not tokenizer.strips_leading_space
    assert tokenizer.decode(tokenizer.encode("Hello", add_bos=False)) == "Hello"
    assert tokenizer.encode("USER", add_bos=False) == [11889]


def test_no_bos_by_tokenizer_config(tmp_path: Path) -> None:
    folder = save_llama(tmp_path, tokenizer_config={"add_bos_token": False})
    assert not load_tokenizer(folder).adds_bos


def test_added_token_that_contradicts_the_vocabulary_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_llama(tmp_path, added_tokens={"<|x|>": 5, "<|y|>": 32000})
    tokenizer = load_tokenizer(folder)
    assert "<|x|>" not in tokenizer.special_ids
    assert tokenizer.special_ids["<|y|>"] == 32000
    assert "<|x|>" in caplog.text


def test_ordinary_piece_named_as_added_token_is_out_of_reach(tmp_path: Path) -> None:
    decoder = {"11889": {"content": "USER", "special": True}}
    folder = save_llama(
        tmp_path, tokenizer_config={"added_tokens_decoder": decoder, "add_prefix_space": False}
    )
    tokenizer = load_tokenizer(folder)
    assert 11889 not in tokenizer.encode("USER", add_bos=False)
    assert tokenizer.decode(tokenizer.encode("USER", add_bos=False)) == "USER"


def varint(number: int) -> bytes:
    encoded = b""
    while number >= 0x80:
        encoded += bytes([number & 0x7F | 0x80])
        number >>= 7
    return encoded + bytes([number])


def field(number: int, value: int | float | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def piece(text: str, score: float = 0.0, kind: int = 1) -> bytes:
    return field(1, field(1, text) + field(2, score) + field(3, kind))


SPECIALS = piece("<unk>", 0.0, 2) + piece("<s>", 0.0, 3) + piece("</s>", 0.0, 3)
BPE_TRAINER = field(2, field(3, 2))
PLAIN_NORMALIZER = field(3, field(4, 0))


def refused(data: bytes, reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        tokenizer_of(data)


def test_smallest_model() -> None:
    data = SPECIALS + piece("a") + piece("aa", -1.0) + BPE_TRAINER + PLAIN_NORMALIZER
    tokenizer = tokenizer_of(data)
    assert tokenizer.encode("aaa", add_bos=False) == judge_of(data).encode("aaa")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "holds no pieces"),
        (b"\xff" * 40, "more than 10 bytes"),
        (b"\x0a\xff\xff\xff\x7f", "passes the end"),
        (b"\x0a", "in the middle of a number"),
        (b"\x0b\x01", "wire type 3"),
        (b"\x08\x01", "damaged"),
        (field(1, field(1, b"\xff\xfe")), "damaged"),
        (field(1, field(1, "a") + field(2, 3)), "damaged"),
        (field(1, field(1, 7)), "damaged"),
        (SPECIALS + PLAIN_NORMALIZER, "not a BPE model"),
        (SPECIALS + field(2, field(3, 1)) + PLAIN_NORMALIZER, "not a BPE model"),
        (SPECIALS + field(2, field(3, 2) + field(24, 1)) + PLAIN_NORMALIZER, "end of words"),
        (SPECIALS + BPE_TRAINER, "rewrites text"),
        (SPECIALS + BPE_TRAINER + field(3, field(2, b"xx") + field(4, 0)), "rewrites text"),
        (SPECIALS + piece("a" * 513) + BPE_TRAINER + PLAIN_NORMALIZER, "513 characters"),
        (SPECIALS + piece("▁▁", 0.0, 4) + BPE_TRAINER + PLAIN_NORMALIZER, "white space"),
    ],
)
def test_damaged_or_unsupported_model_is_refused(data: bytes, reason: str) -> None:
    refused(data, reason)


def test_more_pieces_than_any_vocabulary_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentencepiece_model, "MAX_PIECES", 4)
    refused(SPECIALS + piece("a") + piece("b") + BPE_TRAINER + PLAIN_NORMALIZER, "more than 4 pie")


def test_pieces_that_make_each_other_in_too_many_ways_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sentencepiece_model, "MAX_MERGES", 100)
    runs = b"".join(piece("a" * length) for length in range(1, 30))
    refused(SPECIALS + runs + BPE_TRAINER + PLAIN_NORMALIZER, "in more than 100 ways")


def test_added_token_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    data = SPECIALS + piece("a") + BPE_TRAINER + PLAIN_NORMALIZER
    (tmp_path / "tokenizer.model").write_bytes(data)
    (tmp_path / "added_tokens.json").write_text(r'{"<\ud800>": 4}')
    with pytest.raises(ModelLoadError, match=r"'<\\ud800>' holds half of a surrogate pair"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("token_id", ["9" * 5000, "²", "x"])
def test_added_token_whose_id_is_no_number_is_refused(tmp_path: Path, token_id: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(
        SPECIALS + piece("a") + BPE_TRAINER + PLAIN_NORMALIZER
    )
    table = {"added_tokens_decoder": {token_id: {"content": "<x>"}, "5": "no table"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(table))
    with pytest.raises(ModelLoadError, match=r"'<x>' has the id .* no number"):
        load_tokenizer(tmp_path)
    table["added_tokens_decoder"]["4"] = table["added_tokens_decoder"].pop(token_id)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(table))
    assert load_tokenizer(tmp_path).special_ids["<x>"] == 4


def test_truncated_model_is_refused_everywhere_or_lacks_pieces() -> None:
    model = train_sentencepiece()
    outcomes = set()
    for end in range(0, len(model), 37):
        try:
            tokenizer_of.__wrapped__(model[:end])
            outcomes.add("read")
        except ModelLoadError:
            outcomes.add("refused")
    assert outcomes == {"refused"}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_mutated_model_never_crashes(data: st.DataObject) -> None:
    model = bytearray(SPECIALS + piece("a") + piece("aa", -1.0) + BPE_TRAINER + PLAIN_NORMALIZER)
    for _ in range(data.draw(st.integers(1, 4))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    try:
        tokenizer = tokenizer_of.__wrapped__(bytes(model))
    except ModelLoadError:
        return
    tokenizer.encode("aaa b", add_bos=True)


def test_unigram_model_of_the_real_trainer_is_refused() -> None:
    refused(train_sentencepiece(model_type="unigram", vocab_size=380), "not a BPE model")


def test_normalising_model_of_the_real_trainer_is_refused() -> None:
    refused(train_sentencepiece(normalization_rule_name="nmt_nfkc"), "rewrites text")


def test_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ModelLoadError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_oversized_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.model").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(ModelLoadError, match="over the limit"):
        load_tokenizer(tmp_path)


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no tokenizer"):
        load_tokenizer(save_json(tmp_path, config={}))


@pytest.mark.parametrize("added", [{"<x>": "y"}, {"<x>": -1}, {"<x>": True}, {"<x>": 1 << 40}])
def test_added_token_without_a_usable_id(tmp_path: Path, added: dict[str, Any]) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece())
    with pytest.raises(ModelLoadError, match="<x>"):
        load_tokenizer(save_json(tmp_path, added_tokens=added))


def test_damaged_settings_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece())
    (tmp_path / "tokenizer_config.json").write_text("{", "utf-8")
    with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)
