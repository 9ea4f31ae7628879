"""Tokenizers inside GGUF metadata: the same ids as the model's own tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from chatserve.errors import ModelLoadError
from chatserve.models.byte_level import piece_bytes, splitting
from chatserve.models.tokenizer import load_tokenizer
from tests.unit.models.test_tokenizer_json import LLAMA3
from tests.unit.models.vocabularies import TEXTS, save_byte_level

GGUF = Path("model.gguf")
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def metadata_of(folder: Path, pre: str | None, **values: Any) -> dict[str, Any]:
    """What a converter writes for the tokenizer.json of `folder`."""
    data = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    ids = dict(data["model"]["vocab"])
    types = dict.fromkeys(ids.values(), 1)
    for token in data["added_tokens"]:
        ids[token["content"]] = token["id"]
        types[token["id"]] = 3 if token["special"] else 4
    tokens = [text for text, _ in sorted(ids.items(), key=lambda item: item[1])]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [types[i] for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in data["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": ids["<|im_end|>"],
    }
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    return metadata | {f"tokenizer.ggml.{name}": value for name, value in values.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_byte_level(tmp_path, special=SPECIALS, plain=["<think>", "    "])
    return tmp_path


@pytest.mark.parametrize(
    ("pre", "pattern", "options"),
    [
        ("llama-bpe", LLAMA3, {"ignore_merges": True}),
        ("qwen2", QWEN2, {"nfc": True}),
        ("tekken", TEKKEN, {"ignore_merges": True}),
        ("gpt-2", GPT2, {}),
        ("default", GPT2, {}),
        (None, GPT2, {}),
    ],
)
def test_same_ids_as_tokenizer_json(
    tmp_path: Path, pre: str | None, pattern: str, options: dict[str, Any]
) -> None:
    vocabulary = save_byte_level(tmp_path, special=SPECIALS, pattern=pattern, **options)
    tokenizer = load_tokenizer(GGUF, metadata_of(tmp_path, pre))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_bos=False)
        assert ids == vocabulary.encode(text).ids, text
        if pre != "qwen2":
            assert tokenizer.decode(ids) == text


def test_smollm_cuts_digits_one_by_one(folder: Path) -> None:
    tokenizer = load_tokenizer(GGUF, metadata_of(folder, "smollm"))
    data = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    data["pre_tokenizer"]["pretokenizers"].insert(0, digits)
    judge = Tokenizer.from_str(json.dumps(data))
    for text in TEXTS:
        assert tokenizer.encode(text, add_bos=False) == judge.encode(text).ids


def test_token_types(folder: Path) -> None:
    tokenizer = load_tokenizer(GGUF, metadata_of(folder, "gpt-2"))
    ids = tokenizer.special_ids
    assert set(ids) == {*SPECIALS, "<think>"}  # the four spaces are text
    assert tokenizer.token_bytes(ids["<|im_start|>"]) == b""
    assert tokenizer.token_bytes(ids["<think>"]) == b"<think>"
    for text in ids:
        assert not set(ids.values()) & set(tokenizer.encode(f"a {text} b", add_bos=False))
    assert tokenizer.decode(tokenizer.encode("a    b", add_bos=False)) == "a    b"
    assert len(tokenizer.encode("a    b", add_bos=False)) == 3


def test_end_ids_of_turns_and_messages(folder: Path) -> None:
    first = load_tokenizer(GGUF, metadata_of(folder, "gpt-2")).special_ids["<|endoftext|>"]
    metadata = metadata_of(folder, "gpt-2", eot_token_id=first, eom_token_id=5)
    assert load_tokenizer(GGUF, metadata).eos_ids == {first, first + 2, 5}


@pytest.mark.parametrize(
    ("pre", "values", "adds_bos"),
    [
        ("gpt-2", {}, False),
        ("gpt-2", {"add_bos_token": True}, True),
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
    ],
)
def test_bos_custom(folder: Path, pre: str, values: dict[str, Any], adds_bos: bool) -> None:
    tokenizer = load_tokenizer(GGUF, metadata_of(folder, pre, bos_token_id=5, **values))
    assert tokenizer.adds_bos is adds_bos


def test_without_bos_none_is_added(folder: Path) -> None:
    assert not load_tokenizer(GGUF, metadata_of(folder, "llama-bpe")).adds_bos


def test_padding_token_is_forbidden_unless_it_ends_answers(tmp_path: Path) -> None:
    save_byte_level(tmp_path, special=[*SPECIALS, "<pad>"])
    metadata = metadata_of(tmp_path, "gpt-2")
    tokenizer = load_tokenizer(GGUF, metadata)
    pad = tokenizer.special_ids["<pad>"]
    assert tokenizer.forbidden_ids == {pad}
    metadata["tokenizer.ggml.eos_token_id"] = pad
    assert not load_tokenizer(GGUF, metadata).forbidden_ids


def test_no_space_prefix(folder: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "▁a"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -3.0, -2.0, -1.0],
        # Some converters call every piece ordinary.
        "tokenizer.ggml.token_type": [1] * 6,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = load_tokenizer(GGUF, metadata)
    assert tokenizer.encode("a a", add_bos=False) == [4, 5]
    assert not tokenizer.strips_leading_space
    assert set(tokenizer.special_ids) == {"<s>", "</s>"}
    with_prefix = load_tokenizer(GGUF, metadata | {"tokenizer.ggml.add_space_prefix": True})
    assert with_prefix.encode("a a", add_bos=True) == [1, 5, 5]


def test_byte_alphabet_is_whole() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(piece_bytes(letter) for letter in ByteLevel.alphabet()) == [
        bytes([byte]) for byte in range(256)
    ]
    assert piece_bytes("中") == "中".encode()


def test_unknown_splitting_is_refused_by_name() -> None:
    with pytest.raises(ModelLoadError, match=r"'brand-new'.*known: smollm, llama-bpe"):
        splitting("brand-new")


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda metadata: metadata.pop(f"tokenizer.ggml.{name}")


def put(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda metadata: metadata.update({f"tokenizer.ggml.{name}": value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop("model"), "no tokenizer"),
        (put("model", "bert"), "'bert' is not supported"),
        (put("model", ["llama"]), "not supported"),
        (put("pre", "unheard-of"), "'unheard-of'"),
        (put("pre", 7), "7"),
        (drop("tokens"), "tokens is missing"),
        (put("tokens", []), "tokens is missing"),
        (put("tokens", [1, 2]), "not a list of texts"),
        (put("tokens", "abc"), "not a list of texts"),
        (drop("merges"), "merges is missing"),
        (put("merges", ["a b c"]), "'a b c' is not a pair"),
        (put("merges", ["ab"]), "'ab' is not a pair"),
        (put("merges", ["no such"]), "damaged"),
        (drop("token_type"), "none values"),
        (put("token_type", [1]), "1 values"),
        (put("eos_token_id", 10**6), "outside its"),
        (put("eos_token_id", "2"), "outside its"),
        (put("bos_token_id", "1"), "outside its"),
    ],
)
def test_damaged_metadata(
    folder: Path, change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    metadata = metadata_of(folder, "gpt-2")
    change(metadata)
    with pytest.raises(ModelLoadError, match=reason):
        load_tokenizer(GGUF, metadata)


@pytest.mark.parametrize("name", ["bos", "eot", "padding"])
def test_named_token_that_is_none_is_ignored(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = load_tokenizer(GGUF, metadata_of(folder, "gpt-2"))
    metadata = metadata_of(folder, "gpt-2", **{f"{name}_token_id": 2**32 - 1})
    tokenizer = load_tokenizer(GGUF, metadata)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, plain.eos_ids)
    assert f"tokenizer.ggml.{name}_token_id is 4294967295, outside its" in caplog.text


def test_vocabulary_over_which_the_library_panics() -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a"] * 4,
        "tokenizer.ggml.token_type": [1] * 4,
        "tokenizer.ggml.merges": ["a a"],
    }
    with pytest.raises(ModelLoadError, match="the tokenizer in the GGUF file is damaged"):
        load_tokenizer(GGUF, metadata)


def test_llama_vocabulary_without_scores() -> None:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"],
        "tokenizer.ggml.token_type": [2, 3, 3],
    }
    with pytest.raises(ModelLoadError, match="scores"):
        load_tokenizer(GGUF, metadata)


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelLoadError):
        load_tokenizer(tmp_path / "x.gguf")
