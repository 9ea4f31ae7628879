"""Chats whose last message is the beginning of the answer, in every form a chat has."""

from __future__ import annotations

import pytest

from chatserve.engine.continuation import render_open
from chatserve.engine.prompt import Message
from chatserve.errors import InvalidRequest
from chatserve.models.special_tokens import Special, SpecialTokens
from chatserve.models.templates import ChatTemplate
from chatserve.models.templates.builtin import BUILTIN
from chatserve.models.templates.jinja import JinjaTemplate

CHAT = [Message("user", "hi"), Message("assistant", "Sure, the ")]
TRIMS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def jinja(source: str) -> JinjaTemplate:
    return JinjaTemplate("own", source, SpecialTokens([]), {})


def opened(template: ChatTemplate, *messages: Message) -> str:
    return "".join(render_open(template, messages or CHAT))


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_start|>assistant\nSure, the "),
        ("vicuna_v1.1", "USER: hi ASSISTANT: Sure, the "),
        ("llama-2", "[INST] hi [/INST] Sure, the "),
    ],
)
def test_the_prompt_ends_inside_the_answer(name: str, end: str) -> None:
    assert opened(BUILTIN[name]).endswith(end)


@pytest.mark.parametrize("name", BUILTIN)
def test_every_template_has_a_form_for_it_or_says_that_it_has_none(name: str) -> None:
    template = BUILTIN[name]
    try:
        text = opened(template)
    except InvalidRequest as error:
        assert error.param == "continue_final_message" and template.name in error.message
        assert name == "stackllama"
        return
    assert text.endswith("Sure, the ") or text.endswith("Sure, the")
    assert text.startswith("".join(template.render(CHAT[:1])))


def test_a_template_that_trims_keeps_the_end_of_the_text() -> None:
    assert opened(jinja(TRIMS)) == "<user>hi</s><assistant>Sure, the "


def test_an_answer_of_no_text_is_one_that_is_to_begin() -> None:
    template = BUILTIN["vicuna_v1.1"]
    empty = Message("assistant", "")
    assert opened(template, CHAT[0], empty) == "".join(template.render(CHAT[:1]))


def test_special_tokens_stay_what_they_are() -> None:
    rendered = render_open(BUILTIN["chatml"], CHAT)
    assert rendered[-1] == "Sure, the " and Special("<|im_start|>") in rendered
    assert [type(part) for part in rendered].count(Special) > 2


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m['content'][:3] }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}",
    ],
)
def test_a_template_that_hides_the_text_is_refused(source: str) -> None:
    with pytest.raises(InvalidRequest, match="own has no form") as caught:
        opened(jinja(source))
    assert caught.value.param == "continue_final_message"


def test_text_may_hold_nearly_everything() -> None:
    marks = [chr(plane << 16 | 0xFFFE) for plane in range(1, 17)]
    assert opened(jinja(TRIMS), CHAT[0], Message("assistant", "".join(marks[:15]))).endswith(
        marks[14]
    )
    with pytest.raises(InvalidRequest, match="noncharacter"):
        opened(jinja(TRIMS), CHAT[0], Message("assistant", "".join(marks)))
