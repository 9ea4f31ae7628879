"""What a vocabulary's own rules put around a whole text, and how WordPiece writes text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from chatserve.models.tokenizer import load_tokenizer
from chatserve.models.wordpiece import reader
from tests import tiny
from tests.encoders import SPECIALS, save_wordpiece, vocabulary


def save(folder: Path, template: str | None, **settings: Any) -> Path:
    tiny.save_tokenizer(folder)
    if template is not None:
        path = str(folder / "tokenizer.json")
        tokenizer = Tokenizer.from_file(path)
        ids = [(text, tokenizer.token_to_id(text)) for text in tiny.SPECIALS]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=None, special_tokens=ids
        )
        tokenizer.save(path)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **settings}), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("template", "settings", "frame"),
    [
        (None, {}, ((), ())),
        ("$A <|endoftext|>", {}, ((), (256,))),
        ("<|endoftext|> $A <|im_end|> <|im_start|>", {}, ((256,), (258, 257))),
        ("$A", {"add_eos_token": True}, ((), (258,))),
        ("$A <|endoftext|>", {"add_eos_token": False}, ((), ())),
        ("$A", {"add_eos_token": "yes"}, ((), ())),
    ],
)
def test_of_a_byte_level_vocabulary(
    tmp_path: Path, template: str | None, settings: dict[str, Any], frame: Any
) -> None:
    tokenizer = load_tokenizer(save(tmp_path, template, **settings))
    assert tokenizer.frame == frame
    # prompts, which are continued, have no end
    assert tokenizer.encode("ab", add_bos=False) == tokenizer.encode("ab", add_bos=True)[-2:]


def test_of_wordpiece(tmp_path: Path) -> None:
    save_wordpiece(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = vocabulary()
    assert tokenizer.frame == ((ids["[CLS]"],), (ids["[SEP]"],))
    for special in SPECIALS:  # what is written is text
        assert ids[special] not in set(tokenizer.encode(f"a {special} b", add_bos=False)) - {1}
    found = tokenizer.encode("The CATS sitting", add_bos=False)
    assert found[:3] == [ids["the"], ids["cat"], ids["##s"]]
    assert tokenizer.decode(found) == "the cats sitting"


@pytest.mark.parametrize(
    ("prefix", "piece", "text"),
    [("##", "##ing", b"ing"), ("##", "cat", b" cat"), (None, "##s", b"s"), ("@@", "@@s", b"s"),
     ("@@", "##s", b" ##s"), ("", "##s", b"s"), ("##", "##", b"")],
)  # fmt: skip
def test_pieces(prefix: object, piece: str, text: bytes) -> None:
    assert reader(prefix)(piece) == text
