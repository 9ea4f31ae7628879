"""From a request with tools to prompt, grammar and reader of the answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from chatserve.errors import ContextLengthExceeded, InvalidRequest
from chatserve.models.tool_format import TAGS
from chatserve.server.choices import CallingChoice, choices_of
from chatserve.server.preparation import Prepared, prepare_chat
from tests.fakes import FakeModel
from tests.unit.server.test_grammars import FakeGrammars

USER = {"role": "user", "content": "x"}
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]


def chat(*messages: Any, grammars: FakeGrammars | None = None, **fields: Any) -> Prepared:
    body = {"model": "fake", "messages": messages or [USER], **fields}
    return prepare_chat(json.dumps(body).encode(), FakeModel(grammars=grammars or FakeGrammars()))


def prompt_of(prepared: Prepared) -> str:
    return bytes(prepared.prompts[0].ids).decode()


def spec_of(**fields: Any) -> tuple[str, str, bool]:
    """Kind, source and leading space of what is compiled."""
    grammars = FakeGrammars()
    prepared = chat(grammars=grammars, **fields)
    assert prepared.compile_grammar is not None
    asyncio.run(prepared.compile_grammar())
    return grammars.asked[0]


def test_tools_are_shown_and_answers_are_read() -> None:
    prepared = chat(tools=TOOLS, n=3)
    assert prompt_of(prepared) == "<f><g><user>x" and prepared.tool_format is TAGS
    choices = choices_of(prepared, FakeModel().tokenizer, "id")
    assert len({id(choice) for choice in choices}) == 3
    assert all(isinstance(choice, CallingChoice) for choice in choices)


def test_tools_that_are_hidden_cost_nothing() -> None:
    hidden: list[dict[str, Any]] = [{"tools": TOOLS, "tool_choice": "none"}, {"tools": []}, {}]
    for fields in hidden:
        prepared = chat(**fields)
        assert prompt_of(prepared) == "<user>x" and prepared.tool_format is None
        assert prepared.compile_grammar is None
        assert not choices_of(prepared, FakeModel().tokenizer, "id")


def test_some_of_the_tools_are_allowed_all_are_shown() -> None:
    named = {"type": "function", "function": {"name": "g"}}
    kind, source, after_space = spec_of(tools=TOOLS, tool_choice=named)
    assert kind == "tools" and '"g\\"' in source and '"f\\"' not in source
    # the space in front is part of this grammar, which may begin with a token of its own
    assert source.startswith('start: " " (calls)') and not after_space
    assert prompt_of(chat(tools=TOOLS, tool_choice=named)) == "<f><g><user>x"


def test_an_answer_that_has_begun_has_no_space_in_front() -> None:
    opened = [USER, {"role": "assistant", "content": "y"}]
    _, source, _ = spec_of(tools=TOOLS, messages=opened, continue_final_message=True)
    assert source.startswith("start: TEXT | head first\n")


def test_json_may_have_the_text_of_a_call_in_it() -> None:
    prepared = chat(tools=TOOLS, response_format={"type": "json_object"})
    assert prepared.tool_format is not None and not prepared.tool_format.follows_text


def test_without_grammars_there_are_no_tools() -> None:
    body = json.dumps({"model": "fake", "messages": [USER], "tools": TOOLS}).encode()
    with pytest.raises(InvalidRequest, match="tools is not offered by this server"):
        prepare_chat(body, FakeModel())


def test_arguments_of_calls_are_counted_before_they_are_read() -> None:
    arguments = json.dumps({"x": "y" * 20_000})
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "c", "content": "z"}
    with pytest.raises(ContextLengthExceeded, match=r"has 20,0\d\d bytes"):
        chat(USER, {"role": "assistant", "content": "", "tool_calls": [call]}, result)


@pytest.mark.parametrize(
    ("fields", "stop"),
    [
        ({}, ("END", "###")),
        ({"tools": TOOLS}, ("END", "###")),
        ({"tools": TOOLS, "tool_choice": "none"}, ("END", "###")),
        ({"tools": TOOLS, "tool_choice": "required"}, ("END",)),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, ("END",)),
        ({"response_format": {"type": "json_object"}}, ("END",)),
    ],
)
def test_what_ends_a_turn_in_text_may_stand_in_json(
    fields: dict[str, Any], stop: tuple[str, ...]
) -> None:
    """Vicuna v0 ends turns with ###, which is an honest part of a JSON text."""
    body = {"model": "fake", "messages": [USER], "stop": ["END"], **fields}
    model = FakeModel(stop=("###",), grammars=FakeGrammars())
    prepared = prepare_chat(json.dumps(body).encode(), model)
    assert prepared.prompts[0].params.stop == stop
