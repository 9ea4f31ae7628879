"""Token ids of texts and chats of any length, and the way back."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatserve.engine.prompt import Message, PromptBuilder
from chatserve.engine.tokenization import Tokenization
from chatserve.errors import InvalidRequest
from chatserve.models.templates.builtin import BUILTIN
from chatserve.models.tokenizer import Tokenizer, load_tokenizer
from tests.unit.models.vocabularies import TEXTS, llama_model, save_byte_level

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONTEXT = 40
CHAT = [Message("user", "hi")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_level(
        folder, special=SPECIALS, bos_token="<|endoftext|>", eos_token="<|im_end|>",
        add_bos_token=True,
    )  # fmt: skip
    return load_tokenizer(folder)


def tokenization(tokenizer: Tokenizer, vocab_size: int = 0) -> Tokenization:
    prompts = PromptBuilder(tokenizer, BUILTIN["chatml"], CONTEXT)
    return Tokenization(tokenizer, prompts, vocab_size)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.model").write_bytes(llama_model())
    return load_tokenizer(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_there_and_back(tokenizer: Tokenizer, llama: Tokenizer, text: str) -> None:
    for each in (tokenizer, llama):
        if each is llama:
            text = text.replace("▁", " ")  # how it writes a space
        tokens = tokenization(each)
        ids = tokens.of_text(text, add_special_tokens=False)
        assert tokens.text(ids) == text
        with_bos = tokens.of_text(text)
        assert with_bos == [each.bos_id, *ids]
        assert tokens.text(with_bos) == tokens.pieces(with_bos)[0] + text
        assert tokens.text(with_bos, skip_special_tokens=True) == text


def test_a_chat_has_the_ids_of_the_chat_route(tokenizer: Tokenizer) -> None:
    prompts = PromptBuilder(tokenizer, BUILTIN["chatml"], CONTEXT, "be kind")
    tokens = Tokenization(tokenizer, prompts, 0)
    ids = tokens.of_chat(CHAT)
    assert ids == prompts.chat(CHAT)
    written = (
        "<|endoftext|><|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokens.text(ids) == written
    assert tokens.text(ids, skip_special_tokens=True) == "system\nbe kind\nuser\nhi\nassistant\n"
    said = tokens.of_chat([*CHAT, Message("assistant", "yes")], add_generation_prompt=False)
    assert tokens.text(said) == written + "yes<|im_end|>\n"


def test_an_answer_that_goes_on_has_the_ids_of_the_chat_route(tokenizer: Tokenizer) -> None:
    prompts = PromptBuilder(tokenizer, BUILTIN["chatml"], CONTEXT)
    begun = [*CHAT, Message("assistant", "yes, ")]
    ids = Tokenization(tokenizer, prompts, 0).of_chat(begun, is_open=True)
    assert ids == prompts.chat(begun, is_open=True)
    assert Tokenization(tokenizer, prompts, 0).text(ids).endswith("<|im_start|>assistant\nyes, ")
    with pytest.raises(InvalidRequest, match="last message"):
        Tokenization(tokenizer, prompts, 0).of_chat(CHAT, is_open=True)


def test_a_chat_longer_than_the_context_is_counted(tokenizer: Tokenizer) -> None:
    assert len(tokenization(tokenizer).of_chat([Message("user", "word " * CONTEXT)])) > CONTEXT


def test_an_answer_at_the_end_is_refused_where_another_should_follow(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="last message"):
        tokenization(tokenizer).of_chat([*CHAT, Message("assistant", "yes")])


def test_text_is_never_a_special_token(tokenizer: Tokenizer) -> None:
    tokens = tokenization(tokenizer)
    ids = tokens.of_text("<|im_end|>", add_special_tokens=False)
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokens.text(ids) == "<|im_end|>"


def test_pieces_are_the_vocabularys_own(tokenizer: Tokenizer, llama: Tokenizer) -> None:
    tokens = tokenization(tokenizer)
    assert tokens.pieces(tokens.of_text("a\n")) == ["<|endoftext|>", "a", "Ċ"]
    tokens = tokenization(llama)
    assert tokens.pieces(tokens.of_text("Hello there")) == ["<s>", "▁Hello", "▁there"]


@pytest.mark.parametrize("vocab_size", [0, 5000])
def test_ids_up_to_the_last_row(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Of the model, which may have more rows than the tokenizer tokens, or of the tokenizer."""
    tokens = tokenization(tokenizer, vocab_size)
    last = max(vocab_size, tokenizer.vocab_size) - 1
    assert tokens.text([]) == ""
    assert isinstance(tokens.text([0, last]), str)
    for token_id in (-1, last + 1):
        with pytest.raises(InvalidRequest, match=f"no token {token_id}"):
            tokens.text([0, token_id])


def test_padding_rows_have_no_text(tokenizer: Tokenizer) -> None:
    tokens = tokenization(tokenizer, 5000)
    assert (tokens.text([4999]), tokens.pieces([4999])) == ("", [""])


def test_bytes_that_are_no_character(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = tokenization(tokenizer)
    first, *_ = tokens.of_text("😀", add_special_tokens=False)
    assert tokens.text([first]) == "\ufffd"
