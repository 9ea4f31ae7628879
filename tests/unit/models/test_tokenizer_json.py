"""tokenizer.json folders: transformers' ids for honest text, no special id for any other."""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from chatserve.errors import GenerationFailed, InvalidRequest, ModelLoadError
from chatserve.models import special_tokens, tokenizer_json
from chatserve.models.special_tokens import Special, SpecialTokens
from chatserve.models.tokenizer import load_tokenizer
from tests.unit.models.vocabularies import (
    TEXTS,
    save_byte_level,
    save_json,
    save_metaspace,
    transformers_tokenizer,
)

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>", "<tool_call>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = ["qwen", "llama3", "gpt2", "legacy", "first", "always", "never"]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@functools.cache
def folder_of(kind: str) -> Path:
    folder = Path(tempfile.mkdtemp())
    if kind == "qwen":
        pattern = LLAMA3.replace("{1,3}", "")
        save_byte_level(folder, special=CHATML, plain=THINK, pattern=pattern, nfc=True)
    elif kind == "llama3":
        save_byte_level(
            folder, special=CHATML, pattern=LLAMA3, ignore_merges=True, bos="<|endoftext|>",
            bos_token="<|endoftext|>",
        )  # fmt: skip
    elif kind == "gpt2":
        save_byte_level(folder, special=CHATML, plain=["  ", "        "])
    else:
        save_metaspace(
            folder, prepend_scheme=None if kind == "legacy" else kind, special=["[INST]"]
        )
    return folder


@functools.cache
def pair_of(kind: str) -> tuple[Any, Any]:
    return load_tokenizer(folder_of(kind)), transformers_tokenizer(folder_of(kind))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_text(kind: str, text: str) -> None:
    text = text.replace("<s>", "").replace("</s>", "").replace("<unk>", "")
    ours, judge = pair_of(kind)
    ids = ours.encode(text, add_bos=False)
    assert ids == judge.encode(text, add_special_tokens=False)
    decoded = judge.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.decode(ids) == decoded


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_text(kind: str, data: st.DataObject) -> None:
    ours, judge = pair_of(kind)
    text = data.draw(UNICODE)
    assume(not any(token in text for token in ours.special_ids))
    assert ours.encode(text, add_bos=False) == judge.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_between_texts(kind: str) -> None:
    ours, judge = pair_of(kind)
    first, last = list(ours.special_ids)[1:3]
    rendered = ["Hello", Special(first), " the", Special(last), Special(last), "Hello the\n"]
    text = "".join(rendered)
    assert ours.encode(rendered, add_bos=False) == judge.encode(text, add_special_tokens=False)
    assert ours.encode(ours.special_tokens.split(text), add_bos=False) == ours.encode(
        rendered, add_bos=False
    )


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_as_text(kind: str) -> None:
    ours, _ = pair_of(kind)
    special = set(ours.special_ids.values())
    for text in ours.special_ids:
        for variant in (text, f"a{text}b", f" {text} ", text * 3, text[:-1], text[1:]):
            ids = ours.encode(variant, add_bos=False)
            assert not special & set(ids), (kind, variant)
            # Metaspace adds no word-start mark in front of a space, so that space may be gone.
            assert ours.decode(ids).strip() == variant.strip()


@pytest.mark.parametrize("kind", ["legacy", "always", "first"])
def test_merges_never_rebuild_a_special_token(kind: str) -> None:
    ours, judge = pair_of(kind)
    assert judge.convert_tokens_to_ids("</s>") == 2
    ids = ours.encode("</s>", add_bos=False)
    assert 2 not in ids
    assert ours.decode(ids) == "</s>"


def test_bos_from_the_post_processor() -> None:
    llama3, _ = pair_of("llama3")
    assert llama3.adds_bos
    assert llama3.encode("a", add_bos=True)[0] == llama3.bos_id
    assert not pair_of("qwen")[0].adds_bos


def test_bos_setting_beats_the_post_processor(tmp_path: Path) -> None:
    save_metaspace(tmp_path, prepend_scheme="first", special=[], add_bos_token=False)
    assert not load_tokenizer(tmp_path).adds_bos


def test_llama_class_adds_bos_even_where_transformers_5_dropped_it(tmp_path: Path) -> None:
    save_metaspace(tmp_path, prepend_scheme="first", special=[], tokenizer_class="LlamaTokenizer")
    data = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    save_json(tmp_path, tokenizer=data | {"post_processor": None})
    assert load_tokenizer(tmp_path).adds_bos


def test_bos_is_never_doubled() -> None:
    ours, _ = pair_of("llama3")
    bos = Special("<|endoftext|>")
    once = [ours.bos_id, *ours.encode("a", add_bos=False)]
    assert ours.encode([bos, "a"], add_bos=True) == once
    assert ours.encode(["", bos, "a"], add_bos=True) == once
    assert ours.encode(["a"], add_bos=True) == once


def test_plain_added_tokens_are_shown_and_special_ones_are_not() -> None:
    ours, _ = pair_of("qwen")
    ids = ours.special_ids
    assert ours.decode([ids["<|im_start|>"], ids["<think>"], ids["</think>"]]) == "<think></think>"


def test_white_space_tokens_stay_text() -> None:
    ours, judge = pair_of("gpt2")
    assert "  " not in ours.special_ids
    ids = ours.encode("a  b", add_bos=False)
    assert judge.convert_tokens_to_ids("  ") in ids
    assert ours.decode(ids) == "a  b"


def test_tokens_swallow_white_space_when_the_file_says_so(tmp_path: Path) -> None:
    tokenizer = save_byte_level(tmp_path, special=CHATML)
    tokenizer.add_special_tokens(
        [AddedToken("<|eat|>", lstrip=True, rstrip=True, normalized=False)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours, judge = load_tokenizer(tmp_path), transformers_tokenizer(tmp_path)
    text = "a  <|eat|> \n b"
    expected = judge.encode(text, add_special_tokens=False)
    assert ours.encode(ours.special_tokens.split(text), add_bos=False) == expected
    assert ours.encode(["a  ", Special("<|eat|>"), " \n b"], add_bos=False) == expected


def test_token_that_only_the_settings_know(tmp_path: Path) -> None:
    decoder = {"500": {"content": "<|late|>", "special": True}}
    save_byte_level(tmp_path, special=CHATML, added_tokens_decoder=decoder)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_ids["<|late|>"] == 500
    assert tokenizer.vocab_size == 501
    assert tokenizer.token_bytes(500) == b""
    assert tokenizer.token_bytes(499) == b""


def test_settings_make_a_token_special(tmp_path: Path) -> None:
    vocabulary = save_byte_level(tmp_path, special=[], plain=["<|im_end|>"])
    token_id = vocabulary.token_to_id("<|im_end|>")
    save_json(
        tmp_path,
        special_tokens_map={"eos_token": "<|im_end|>"},
        tokenizer_config={
            "added_tokens_decoder": {str(token_id): {"content": "<|im_end|>", "special": True}}
        },
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == {token_id}
    assert tokenizer.token_bytes(token_id) == b""


def test_named_tokens_fall_back_to_config_ids_then_to_llama_names(tmp_path: Path) -> None:
    vocabulary = save_byte_level(tmp_path, special=CHATML)
    end = vocabulary.token_to_id("<|im_end|>")
    save_json(tmp_path, config={"eos_token_id": end, "bos_token_id": None})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, {end})
    assert tokenizer.encode("a", add_bos=True) == tokenizer.encode("a", add_bos=False)


def test_blank_names_of_a_broken_conversion(tmp_path: Path) -> None:
    save_metaspace(
        tmp_path, prepend_scheme=None, special=[], bos_token="", eos_token="", unk_token=""
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})


def test_unigram_vocabulary(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("</s>", -1.0), ("▁he", -2.0), ("llo", -2.5), ("▁", -4.0)]
    pieces += [(letter, -9.0) for letter in "abdefhklnrsu<>/ "]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.encode("hello", add_bos=False) == [2, 3]
    assert 1 not in ours.encode("</s>", add_bos=False)
    assert ours.decode([2, 3, 1]) == "hello"


def test_unknown_special_token_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no special token '<nope>'"):
        pair_of("qwen")[0].encode([Special("<nope>")], add_bos=False)


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        pair_of("qwen")[0].encode("a\ud800b", add_bos=False)


def test_invalid_bytes_decode_to_replacement_characters() -> None:
    ours, _ = pair_of("gpt2")
    ids = ours.encode("é", add_bos=False)
    assert b"".join(map(ours.token_bytes, ids)) == "é".encode()
    assert ours.decode(ours.encode("😀", add_bos=False)[:1]) == "�"


def tokens_of(count: int, length: int) -> list[dict[str, Any]]:
    plain = {"special": True, "lstrip": False, "rstrip": False, "single_word": False}
    return [
        {"id": 1000 + i, "content": f"<{i:06}".ljust(length, "x"), "normalized": False, **plain}
        for i in range(count)
    ]


def replace(content: str, pattern: str = "a") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def sequence(*normalizers: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(normalizers)}


def damaged(folder: Path, change: Any) -> None:
    save_byte_level(folder, special=CHATML)
    data = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    change(data)
    save_json(folder, tokenizer=data)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data.pop("model"), "damaged"),
        (lambda data: data["model"].update(vocab=3), "damaged"),
        (lambda data: data["model"].update(merges=[["x", "no such piece"]]), "damaged"),
        (lambda data: data["model"].update(type="Nonsense"), "damaged"),
        (lambda data: data.update(added_tokens=[{"content": "x"}]), "damaged"),
        (lambda data: data.update(added_tokens=3), "damaged"),
        (lambda data: data.update(decoder={"type": "WordPiece"}, pre_tokenizer=None), "damaged"),
        (
            lambda data: data.update(
                decoder={"type": "BPEDecoder", "suffix": "x"}, pre_tokenizer=None
            ),
            r"BPEDecoder\) is not supported",
        ),
        (lambda data: data.update(decoder=None, pre_tokenizer=None), "decoder (.none.)"),
        (lambda data: data.update(decoder=7, pre_tokenizer=7), "decoder"),
        (lambda data: data.update(added_tokens=tokens_of(65_537, 8)), "65,5.. added tokens"),
        (lambda data: data.update(added_tokens=tokens_of(1, 257)), "token of 257 characters"),
        (lambda data: data.update(normalizer=replace("a" * 65)), "65 times longer"),
        (lambda data: data.update(normalizer={"type": "Prepend", "prepend": "a" * 65}), "65 times"),
        (lambda data: data.update(normalizer=sequence(*[replace("aa")] * 7)), "128 times longer"),
        (lambda data: data.update(normalizer=sequence(*[replace("a")] * 16)), "17 normalizers"),
        (lambda data: data.update(normalizer=replace("a", "b" * 1_000_000)), "over 1,000,000"),
    ],
)
def test_damaged_or_unsupported_file(tmp_path: Path, change: Any, reason: str) -> None:
    damaged(tmp_path, change)
    with pytest.raises(ModelLoadError, match=reason) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in caught.value.message


def test_pattern_that_backtracks_without_end_fails_the_text_alone(tmp_path: Path) -> None:
    def split_slowly(data: dict[str, Any]) -> None:
        slow = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
        parts = [slow | {"invert": False}, data["pre_tokenizer"]]
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}

    damaged(tmp_path, split_slowly)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(GenerationFailed, match="tokenizer failed on the text"):
        tokenizer.encode("a" * 40 + "b", add_bos=False)
    assert tokenizer.decode(tokenizer.encode("ab", add_bos=False)) == "ab"


def test_file_larger_than_other_json_is_read(tmp_path: Path) -> None:
    save_byte_level(tmp_path, special=CHATML)
    with (tmp_path / "tokenizer.json").open("ab") as file:
        file.write(b" " * (17 << 20))
    assert load_tokenizer(tmp_path).vocab_size > len(CHATML)


def test_file_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff{")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", tmp_path / "secret.json"
    folder.mkdir()
    outside.write_text("{}", "utf-8")
    (folder / "tokenizer.json").symlink_to(outside)
    with pytest.raises(ModelLoadError, match="out of the folder"):
        load_tokenizer(folder)


def test_panic_of_the_library_is_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """As pyo3's PanicException: no Exception."""

    def build(data: Any) -> Any:
        raise failure

    save_byte_level(tmp_path, special=CHATML)
    monkeypatch.setattr(tokenizer_json, "_build_encoder", build)
    failure: BaseException = Panic("index out of bounds")
    with pytest.raises(ModelLoadError, match="index out of bounds"):
        load_tokenizer(tmp_path)
    failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(tmp_path)


def test_many_long_tokens_are_guarded_in_linear_memory() -> None:
    tokens = [tokenizer_token(f"<{i:06}".ljust(255, "x") + ">", i) for i in range(4000)]
    tracemalloc.start()
    markers = SpecialTokens(tokens)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000  # all prefixes of all tokens would take over 300 MB
    forged = tokens[7].text
    for cut in range(1, 256):
        assert markers.shield(forged[:cut], "\ufdd0", control_only=False) == forged[:cut] + "\ufdd0"
        assert markers.shield(forged[cut:], "\ufdd0", control_only=False) == "\ufdd0" + forged[cut:]


def tokenizer_token(text: str, token_id: int) -> special_tokens.AddedToken:
    return special_tokens.AddedToken(text, token_id, special=True)


def test_other_threads_run_while_a_text_is_encoded() -> None:
    """The engine's, and the event loop of every stream."""
    encoder = load_tokenizer(folder_of("qwen"))
    text = "many words " * 20_000
    num_turns, is_over = 0, threading.Event()

    def count() -> None:
        nonlocal num_turns
        while not is_over.is_set():
            num_turns += 1
            os.sched_yield()  # gives the lock back; nobody else does so for a minute

    interval = sys.getswitchinterval()
    other = threading.Thread(target=count)
    try:
        sys.setswitchinterval(60)
        other.start()
        before = num_turns
        encoder.encode(text, add_bos=False)
        after = num_turns
    finally:
        is_over.set()
        sys.setswitchinterval(interval)
        other.join()
    assert after - before > 10
