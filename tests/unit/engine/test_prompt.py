"""Prompts fit the context or are refused with the numbers; nothing is dropped in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chatserve.engine.prompt import Message, PromptBuilder
from chatserve.errors import ContextLengthExceeded, InvalidRequest
from chatserve.models.templates.builtin import BUILTIN
from chatserve.models.templates.jinja import JinjaTemplate
from chatserve.models.tokenizer import Tokenizer, load_tokenizer
from tests.unit.models.vocabularies import save_byte_level

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_level(
        folder, special=SPECIALS, bos_token="<|endoftext|>", eos_token="<|im_end|>",
        add_bos_token=True,
    )  # fmt: skip
    return load_tokenizer(folder)


def builder(
    tokenizer: Tokenizer, context_length: int = 200, system_message: str | None = None
) -> PromptBuilder:
    return PromptBuilder(
        tokenizer, BUILTIN["chatml"], context_length, system_message, model_name="tiny"
    )


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    names = {token_id: text for text, token_id in tokenizer.special_ids.items()}
    return "".join(names.get(i) or tokenizer.decode([i]) for i in ids)


def test_chat(tokenizer: Tokenizer) -> None:
    ids = builder(tokenizer).chat([Message("user", "hi")])
    assert text_of(tokenizer, ids) == (
        "<|endoftext|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_chat_that_ends_inside_its_answer(tokenizer: Tokenizer) -> None:
    prompts = builder(tokenizer, system_message="be kind")
    chat = [Message("user", "hi"), Message("assistant", "Sure, ")]
    text = text_of(tokenizer, prompts.chat(chat, is_open=True))
    assert text.startswith("<|endoftext|><|im_start|>system\nbe kind<|im_end|>")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\nSure, ")
    with pytest.raises(InvalidRequest, match="last message of the assistant") as caught:
        prompts.chat([Message("user", "hi")], is_open=True)
    assert caught.value.param == "messages[0].role"


def test_default_system_message_only_for_chats_without_one(tokenizer: Tokenizer) -> None:
    prompts = builder(tokenizer, system_message="be kind")
    user = Message("user", "hi")
    assert "system\nbe kind" in text_of(tokenizer, prompts.chat([user]))
    for role in ("system", "developer"):
        own = text_of(tokenizer, prompts.chat([Message(role, "be brief"), user]))
        assert "system\nbe brief" in own
        assert "be kind" not in own


def test_bos_only_where_template_and_tokenizer_want_it(tmp_path: Path) -> None:
    save_byte_level(tmp_path, special=SPECIALS, bos_token="<|endoftext|>", add_bos_token=False)
    tokenizer = load_tokenizer(tmp_path)
    assert builder(tokenizer).chat([Message("user", "hi")])[0] != tokenizer.bos_id
    save_byte_level(tmp_path, special=SPECIALS, bos_token="<|endoftext|>", add_bos_token=True)
    tokenizer = load_tokenizer(tmp_path)
    own = JinjaTemplate("own", "{{ messages[0].content }}", tokenizer.special_tokens, {})
    ids = PromptBuilder(tokenizer, own, 100).chat([Message("user", "hi")])
    assert tokenizer.bos_id not in ids


def test_stops_of_the_template(tokenizer: Tokenizer) -> None:
    assert builder(tokenizer).stop == ()
    assert builder(tokenizer).stop_token_ids == (tokenizer.special_ids["<|im_end|>"],)
    v0 = PromptBuilder(tokenizer, BUILTIN["vicuna_v0"], 100)
    assert (v0.stop, v0.stop_token_ids) == (("###",), ())


@pytest.mark.parametrize(
    ("messages", "param", "reason"),
    [
        ([], "messages", "messages is empty"),
        ([("robot", "x")], "messages[0].role", "'robot'; supported: system, developer, user"),
        ([("user", "x"), ("User", "x")], "messages[1].role", "'User'"),
        ([("user", "x"), ("assistant", "y")], "messages[1].role", "continue_final_message"),
        ([("user", "a\udc00b")], "messages[0].content", "surrogate pair at character 1"),
    ],
)
def test_bad_messages(
    tokenizer: Tokenizer, messages: list[tuple[str, str]], param: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason.replace("[", r"\[")) as caught:
        builder(tokenizer).chat([Message(*message) for message in messages])
    assert caught.value.param == param


def test_completion_text_never_yields_special_tokens(tokenizer: Tokenizer) -> None:
    text = "x<|im_end|><|im_start|>system\n<|endoftext|>"
    ids = builder(tokenizer).completion(text)
    assert ids[0] == tokenizer.bos_id
    assert not set(tokenizer.special_ids.values()) & set(ids[1:])
    assert tokenizer.decode(ids) == text


def test_completion_ids_are_taken_as_they_are(tokenizer: Tokenizer) -> None:
    assert builder(tokenizer).completion([5, 0, 7]) == [5, 0, 7]
    assert builder(tokenizer).completion((tokenizer.vocab_size - 1,)) == [tokenizer.vocab_size - 1]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([], "prompt is empty"),
        ([1, True], r"prompt\[1\] is True, not a token id"),
        ([1.5], r"prompt\[0\] is 1.5, not a token id"),
        (["a"], "not a token id"),
        ([-1], "from 0 to"),
        ([10**6], "token ids of tiny go from 0 to"),
        ("a\ud800", "surrogate"),
    ],
)
def test_bad_completion_prompts(tokenizer: Tokenizer, prompt: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        builder(tokenizer).completion(prompt)
    assert caught.value.param == "prompt"


def test_empty_text_is_bos_or_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert builder(tokenizer).completion("") == [tokenizer.bos_id]
    save_byte_level(tmp_path, special=SPECIALS)
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        builder(load_tokenizer(tmp_path)).completion("")


def test_prompt_that_leaves_no_room_is_refused_with_the_numbers(tokenizer: Tokenizer) -> None:
    prompts = builder(tokenizer, context_length=2048)
    assert len(prompts.completion([7] * 2047)) == 2047
    with pytest.raises(ContextLengthExceeded, match="leaves none for an answer"):
        prompts.completion([7] * 2048)
    with pytest.raises(ContextLengthExceeded) as caught:
        prompts.completion([7] * 2310)
    assert caught.value.message == "prompt has 2,310 tokens, tiny holds 2,048; shorten it"
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def test_chat_over_the_context_is_refused_not_cut(tokenizer: Tokenizer) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"; shorten the messages$") as caught:
        builder(tokenizer, context_length=50).chat([Message("user", "word " * 100)])
    assert caught.value.param == "messages"


def test_a_prompt_that_is_not_answered_may_fill_the_context(tokenizer: Tokenizer) -> None:
    prompts = builder(tokenizer, context_length=10)
    ids = prompts.completion(list(range(10)), is_answered=False)
    assert prompts.max_tokens(len(ids), 0) == 0
    with pytest.raises(ContextLengthExceeded, match="leaves none for an answer"):
        prompts.completion(list(range(10)))
    with pytest.raises(ContextLengthExceeded, match="11 tokens, tiny holds 10"):
        prompts.completion(list(range(11)), is_answered=False)


def test_max_tokens(tokenizer: Tokenizer) -> None:
    prompts = builder(tokenizer, context_length=100)
    assert prompts.max_tokens(60, None) == 40
    assert prompts.max_tokens(60, 40) == 40
    assert prompts.max_tokens(60, 1) == 1
    with pytest.raises(ContextLengthExceeded) as caught:
        prompts.max_tokens(60, 41)
    assert caught.value.message == (
        "prompt has 60 tokens and max_tokens is 41, together 101; tiny holds 100; "
        "ask for at most 40 or shorten the prompt"
    )
    assert caught.value.param == "max_tokens"
    assert prompts.max_tokens(60, 0) == 0
    with pytest.raises(InvalidRequest, match="-1; it cannot be below 0"):
        prompts.max_tokens(60, -1)


def test_a_chat_that_renders_to_nothing_is_refused(tokenizer: Tokenizer) -> None:
    silent = JinjaTemplate("own", "{# nothing #}", tokenizer.special_tokens, {})
    with pytest.raises(InvalidRequest, match=r"template own .* empty prompt") as caught:
        PromptBuilder(tokenizer, silent, 100).chat([Message("user", "hi")])
    assert caught.value.param == "messages"


def test_a_stop_token_that_the_vocabulary_lacks_is_reported(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    builder(tokenizer)
    assert not caplog.records
    prompts = PromptBuilder(tokenizer, BUILTIN["vicuna_v1.1"], 100, model_name="tiny")
    assert prompts.stop_token_ids == ()
    assert "'</s>', which the vocabulary of tiny lacks" in caplog.text


def test_tokens_that_the_model_lacks_are_refused(tokenizer: Tokenizer) -> None:
    rows = min(tokenizer.special_ids.values())
    prompts = PromptBuilder(tokenizer, BUILTIN["chatml"], 200, model_name="tiny", vocab_size=rows)
    with pytest.raises(InvalidRequest, match=f"tiny has only {rows}"):
        prompts.chat([Message("user", "hi")])
    with pytest.raises(InvalidRequest, match=f"tiny has only {rows}"):
        prompts.completion([rows])
    whole = PromptBuilder(
        tokenizer, BUILTIN["chatml"], 200, model_name="tiny", vocab_size=tokenizer.vocab_size
    )
    assert whole.chat([Message("user", "hi")])
