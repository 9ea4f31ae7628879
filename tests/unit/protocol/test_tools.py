"""Tools in a request: what is read, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from chatserve.errors import InvalidRequest
from chatserve.protocol.chat import MESSAGES_SCHEMA, ChatMessage, ChatRequest, read_chat
from chatserve.protocol.tools import (
    MAX_TOOLS,
    MAX_TOOLS_BYTES,
    TOOL_CHOICE_SCHEMA,
    TOOLS_SCHEMA,
    ToolCall,
    ToolChoice,
)

USER = {"role": "user", "content": "hi"}
F = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


def chat(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    return read_chat({"model": "m", "messages": list(messages) or [USER], **fields})


def refusal(*messages: dict[str, Any], **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        chat(*messages, **fields)
    assert len(caught.value.message) < 300
    return caught.value


def called(**changes: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{**CALL, **changes}]}


def result(**changes: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "c1", "content": "4 °C", **changes}


def schema_of(parameters: Any) -> Any:
    (read,) = chat(tools=[tool(parameters=parameters)]).tools
    return read.schema


def test_a_tool() -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    given = tool(description="d", parameters=parameters, strict=True)
    (read,) = chat(tools=[given]).tools
    assert read.name == "f" and read.schema == {**parameters, "additionalProperties": False}
    # as it was written, for the prompt
    assert read.definition == tool(description="d", parameters=parameters)


def test_a_tool_without_parameters_takes_none() -> None:
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    assert schema_of(None) == nothing
    assert schema_of({}) == {"type": "object"}


def test_properties_that_a_schema_does_not_know_are_closed() -> None:
    inner = {"properties": {"y": {"type": "null"}}}
    closed = {**inner, "additionalProperties": False}
    open_ = {**inner, "additionalProperties": True}
    parameters = {
        "properties": {"a": inner, "b": {"type": "array", "items": inner}, "c": open_,
                       "d": {"anyOf": [inner, {"type": "null"}]}, "e": {"$ref": "#/$defs/D"}},
        "$defs": {"D": inner},
    }  # fmt: skip
    schema = schema_of(parameters)
    assert schema["type"] == "object" and schema["additionalProperties"] is False
    assert schema["properties"]["a"] == closed and schema["properties"]["b"]["items"] == closed
    assert schema["properties"]["c"] == open_
    assert schema["properties"]["d"] == {"anyOf": [closed, {"type": "null"}]}
    assert schema["$defs"]["D"] == closed


@pytest.mark.parametrize(
    "combined",
    [
        {"allOf": [{"properties": {"a": True}}, {"properties": {"b": True}}]},
        {"oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"$ref": "#/$defs/D", "properties": {"a": True}, "$defs": {"D": {"properties": {}}}},
    ],
)
def test_parts_that_hold_together_stay_open(combined: dict[str, Any]) -> None:
    parameters = {"properties": {"x": {"properties": {"y": True}, **combined}}}
    assert schema_of(parameters) == {**parameters, "type": "object"}


@pytest.mark.parametrize(
    ("tools", "param", "word"),
    [
        ("f", "tools", "list"),
        ({}, "tools", "list"),
        ([1], "tools[0]", "object"),
        ([{}], "tools[0].type", "function"),
        ([{"type": "web_search"}], "tools[0].type", "web_search"),
        ([{"type": "function"}], "tools[0].function", "object with a name"),
        ([{**F, "x": 1}], "tools[0].x", "known"),
        ([F, tool(name="")], "tools[1].function.name", "letters"),
        ([tool(name="a b")], "tools[0].function.name", "letters"),
        ([tool(name="<|im_end|>")], "tools[0].function.name", "letters"),
        ([tool(name="x" * 65)], "tools[0].function.name", "64"),
        ([F, F], "tools[1].function.name", "two tools named f"),
        ([tool(description=1)], "tools[0].function.description", "text"),
        ([tool(strict="yes")], "tools[0].function.strict", "true or false"),
        ([tool(cache=1)], "tools[0].function.cache", "known"),
        ([tool(parameters=[])], "tools[0].function.parameters", "JSON Schema"),
        ([tool(parameters={"type": "string"})], "tools[0].function.parameters.type", "object"),
        ([tool(parameters={"not": {}})], "tools[0].function.parameters.not", "keyword"),
        ([tool(name=f"f{i}") for i in range(MAX_TOOLS + 1)], "tools", "129"),
        ([tool(description="x" * MAX_TOOLS_BYTES)], "tools", "262,144"),
    ],
)  # fmt: skip
def test_bad_tools(tools: Any, param: str, word: str) -> None:
    error = refusal(tools=tools)
    assert error.param == param and word in error.message


def test_as_many_tools_as_there_may_be() -> None:
    assert len(chat(tools=[tool(name=f"f{i}") for i in range(MAX_TOOLS)]).tools) == MAX_TOOLS


@pytest.mark.parametrize(
    ("value", "choice"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        (F, ToolChoice("required", ("f",), is_single=True)),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [F, F]}},
         ToolChoice("auto", ("f",))),
    ],
)  # fmt: skip
def test_tool_choice(value: Any, choice: ToolChoice) -> None:
    request = chat(tools=[F], tool_choice=value)
    assert request.tool_choice == choice
    assert request.offers_tools == (value != "none")
    assert Draft202012Validator(TOOL_CHOICE_SCHEMA).is_valid(value)


@pytest.mark.parametrize(
    ("value", "param", "word"),
    [
        ("any", "tool_choice", "'any'"),
        (1, "tool_choice", "object"),
        ({}, "tool_choice.type", "function"),
        ({"type": "function"}, "tool_choice.function", "name"),
        ({"type": "function", "function": {"name": "g"}}, "tool_choice", "no tool named g"),
        ({"type": "function", "function": {"name": 1}}, "tool_choice.function.name", "letters"),
        ({"type": "allowed_tools"}, "tool_choice.allowed_tools", "object"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": [F]}},
         "tool_choice.allowed_tools.mode", "auto or required"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
         "tool_choice.allowed_tools.tools", "1 to 128"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [
            {"type": "function", "function": {"name": "g"}}]}}, "tool_choice", "no tool named g"),
    ],
)  # fmt: skip
def test_bad_tool_choice(value: Any, param: str, word: str) -> None:
    error = refusal(tools=[F], tool_choice=value)
    assert error.param == param and word in error.message


@pytest.mark.parametrize("value", ["required", F])
def test_a_choice_that_has_nothing_to_choose_from(value: Any) -> None:
    assert refusal(tool_choice=value).message == "tool_choice needs tools"
    assert not chat(tool_choice="auto").offers_tools


def test_calls_and_their_results() -> None:
    messages = chat(USER, called(), result(), result(name="f"), USER).messages
    assert messages[1] == ChatMessage("assistant", "", (ToolCall("c1", "f", {"x": 1}),))
    assert messages[2] == ChatMessage("tool", "4 °C", tool_call_id="c1", name="f")
    assert messages[3] == messages[2]
    said = chat(USER, {**called(), "content": "wait"}).messages[1]
    assert said.content == "wait"
    nothing = called(function={"name": "f", "arguments": " "})
    assert chat(USER, nothing).messages[1].tool_calls[0].arguments == {}


@pytest.mark.parametrize(
    ("messages", "param", "word"),
    [
        ([called(), result(tool_call_id="c2")], "messages[1].tool_call_id", "'c2' is no call"),
        ([result()], "messages[0].tool_call_id", "no call"),
        ([called(), result(), USER, result()], "messages[3].tool_call_id", "no call"),
        ([called(), USER, result()], "messages[0].tool_calls", "'c1' has no result"),
        ([called(), called(), result()], "messages[0].tool_calls", "'c1' has no result"),
        ([{**called(), "tool_calls": [CALL, CALL | {"id": "c2"}]}, result()],
         "messages[0].tool_calls", "'c2' has no result"),
        ([called(), result(tool_call_id=None)], "messages[1].tool_call_id", "text"),
        ([called(), result(tool_call_id="x" * 257)], "messages[1].tool_call_id", "256"),
        ([called(), result(content=None)], "messages[1].content", "text"),
        ([called(), result(name="g")], "messages[1].name", "call is of f"),
        ([called(), result(name="a b")], "messages[1].name", "letters"),
        ([called(), {**result(), "x": 1}], "messages[1].x", "known"),
        ([{**USER, "tool_call_id": "c1"}], "messages[0].tool_call_id", "known"),
        ([{**USER, "tool_calls": [CALL]}], "messages[0].tool_calls", "assistant"),
        ([{**USER, "name": 3}], "messages[0].name", "text"),
        ([{**called(), "name": 3}], "messages[0].name", "text"),
        ([{**called(), "tool_calls": {"a": 1}}], "messages[0].tool_calls", "list"),
        ([{**called(), "tool_calls": [CALL] * 129}], "messages[0].tool_calls", "128"),
        ([{**called(), "tool_calls": [CALL, CALL]}], "messages[0].tool_calls[1].id", "two calls"),
        ([called(id="")], "messages[0].tool_calls[0].id", "text"),
        ([called(type="custom")], "messages[0].tool_calls[0].type", "custom"),
        ([called(x=1)], "messages[0].tool_calls[0].x", "known"),
        ([called(function={"name": "f"})], "messages[0].tool_calls[0].function.arguments", "text"),
        ([called(function={"name": "f", "arguments": '{"x": '})],
         "messages[0].tool_calls[0].function.arguments", "cut short"),
        ([called(function={"name": "f", "arguments": "[]"})],
         "messages[0].tool_calls[0].function.arguments", "object"),
    ],
)  # fmt: skip
def test_bad_calls_and_results(messages: list[Any], param: str, word: str) -> None:
    error = refusal(*messages)
    assert error.param == param and word in error.message


def test_a_call_is_not_the_beginning_of_an_answer() -> None:
    error = refusal(USER, called(), continue_final_message=True)
    assert error.param == "continue_final_message" and "tool_calls" in error.message


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [tool(description=None, parameters={}, strict=False)]},
        {"tools": None},
        {"messages": [USER, called(), result(), result(name="f")]},
        {"messages": [{**USER, "tool_calls": None}, {**called(), "content": "x"}]},
    ],
)
def test_what_is_read_is_what_the_document_says(fields: dict[str, Any]) -> None:
    read_chat({"model": "m", "messages": [USER], **fields})
    known = {"tools": TOOLS_SCHEMA, "messages": MESSAGES_SCHEMA}
    for name, value in fields.items():
        Draft202012Validator(known[name]).validate(value)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (TOOLS_SCHEMA, [{**F, "x": 1}]),
        (TOOLS_SCHEMA, [tool(name="a b")]),
        (TOOL_CHOICE_SCHEMA, "any"),
        (TOOL_CHOICE_SCHEMA, {"type": "function"}),
        (MESSAGES_SCHEMA, [result(tool_call_id=None)]),
        (MESSAGES_SCHEMA, [{**USER, "tool_calls": [CALL]}]),
        (MESSAGES_SCHEMA, [{"role": "assistant", "content": None}]),
    ],
)
def test_what_is_refused_is_not_in_the_document(schema: dict[str, Any], value: Any) -> None:
    assert not Draft202012Validator(schema).is_valid(json.loads(json.dumps(value)))
