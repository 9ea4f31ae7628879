"""Responses requests as chats: what is translated, what is refused and by which name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.protocol.chat import ChatMessage
from chatserve.protocol.response_items import MAX_ITEMS
from chatserve.protocol.responses import (
    LOGPROBS,
    MAX_ID_LEN,
    MAX_METADATA,
    MAX_METADATA_KEY,
    MAX_METADATA_VALUE,
    RESPONSES_NO_OPS,
    AskedResponse,
    parse_response,
)
from chatserve.protocol.tools import MAX_TOOLS

USER = {"role": "user", "content": "hi"}


def asked(**fields: Any) -> AskedResponse:
    return parse_response(json.dumps({"model": "fake", "input": "hi", **fields}).encode())


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        asked(**fields)
    assert refused.value.param is not None and refused.value.param in refused.value.message
    return refused.value


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({}, [("user", "hi")]),
        ({"instructions": "be brief"}, [("system", "be brief"), ("user", "hi")]),
        ({"input": [USER]}, [("user", "hi")]),
        ({"input": [{"type": "message", **USER}]}, [("user", "hi")]),
        (
            {
                "input": [
                    {"role": "developer", "content": "x"},
                    {
                        "role": "user",
                        "content": [
                            {"type": "input_text", "text": "a"},
                            {"type": "input_text", "text": "b"},
                        ],
                    },
                ]
            },
            [("system", "x"), ("user", "a\nb")],
        ),
    ],
)
def test_items_are_messages(fields: Any, messages: list[tuple[str, str]]) -> None:
    assert asked(**fields).chat.messages == [ChatMessage(*each) for each in messages]


def test_output_can_be_sent_back_as_it_came() -> None:
    output = {
        "id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": "ho", "annotations": [], "logprobs": []}],
    }  # fmt: skip
    chat = asked(input=[USER, output, USER]).chat
    assert chat.messages[1] == ChatMessage("assistant", "ho")


def test_sampling_goes_on_by_its_names() -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.4, "top_k": 3, "min_p": 0.1, "seed": 7,
        "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.1,
    }  # fmt: skip
    chat = asked(**fields, max_output_tokens=5, truncation="auto", stream=True).chat
    assert {name: getattr(chat, name) for name in fields} == fields
    assert (chat.asked_tokens, chat.truncation, chat.is_stream) == (5, "rolling", True)


def test_logprobs_are_included() -> None:
    assert asked().chat.num_top is None
    assert asked(include=[LOGPROBS]).chat.num_top == 0
    assert asked(include=[LOGPROBS], top_logprobs=3).chat.num_top == 3
    assert refusal(top_logprobs=3).param == "top_logprobs"
    assert refusal(include=["reasoning.encrypted_content"]).param == "include"


def test_text_format_is_a_response_format() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    spec = asked(
        text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    ).chat.grammar
    assert spec is not None and json.loads(spec.source)["properties"] == schema["properties"]
    free = asked(text={"format": {"type": "json_object"}}).chat.grammar
    assert free is not None and free.kind == "json_object"
    assert asked(text={"format": {"type": "text"}}).chat.grammar is None
    assert asked(text={"verbosity": "medium"}).chat.grammar is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [USER, {"type": "reasoning"}]}, "input[1].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": []}]}, "input[0].type"),
        ({"input": [{"role": "alien", "content": "x"}]}, "input[0].role"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": []}]}, "input[0].content"),
        ({"input": [USER | {"name": "x"}]}, "input[0].name"),
        ({"input": [USER | {"id": 3}]}, "input[0].id"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
            "input[0].content[0].text",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "output_text", "text": "x",
             "logprobs": 3}]}]},
            "input[0].content[0].logprobs",
        ),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]},
         "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "input[0].output"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"nonsense": 1}, "nonsense"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"text": 3}, "text"),
        ({"text": {"format": 3}}, "text.format"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"text": {"shape": {}}}, "text.shape"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"tools": 3}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{}]}, "tools[0]"),
        ({"tool_choice": 3}, "tool_choice"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"include": 3}, "include"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": 3}, "metadata"),
        ({"truncation": "rolling"}, "truncation"),
        ({"instructions": 3}, "instructions"),
        ({"previous_response_id": 3}, "previous_response_id"),
        ({"store": "yes"}, "store"),
    ],
)  # fmt: skip
def test_refused_by_name(fields: Any, param: str) -> None:
    assert refusal(**fields).param == param


@pytest.mark.parametrize("name", RESPONSES_NO_OPS)
def test_what_changes_nothing_is_accepted(name: str) -> None:
    for value in RESPONSES_NO_OPS[name]:
        asked(**{name: value})
    assert isinstance(refusal(**{name: "no such value"}), UnsupportedParameter)


@pytest.mark.parametrize(
    ("name", "fits", "is_over"),
    [
        ("max_output_tokens", 1, 0),
        ("temperature", 2, 2.01),
        ("top_p", 1, 1.01),
        ("top_logprobs", 0, -1),
        ("previous_response_id", "x" * MAX_ID_LEN, "x" * (MAX_ID_LEN + 1)),
        ("input", [USER] * MAX_ITEMS, [USER] * (MAX_ITEMS + 1)),
        ("metadata", dict.fromkeys(map(str, range(MAX_METADATA)), ""),
         dict.fromkeys(map(str, range(MAX_METADATA + 1)), "")),
        ("metadata", {"k" * MAX_METADATA_KEY: "v" * MAX_METADATA_VALUE},
         {"k" * (MAX_METADATA_KEY + 1): ""}),
        ("metadata", {"k": "v" * MAX_METADATA_VALUE}, {"k": "v" * (MAX_METADATA_VALUE + 1)}),
    ],
)  # fmt: skip
def test_limits(name: str, fits: Any, is_over: Any) -> None:
    asked(**{name: fits})
    assert refusal(**{name: is_over}).param == name


def test_too_many_tools() -> None:
    tool = {"type": "function", "name": "f"}
    assert refusal(tools=[tool] * (MAX_TOOLS + 1)).param == "tools"


def test_places_of_items() -> None:
    items = [USER, {"role": "assistant", "content": "a"}, USER]
    assert asked(input=items).places == ((0,), (1,), (2,))
    assert asked(input=items, instructions="x").places == ((), (0,), (1,), (2,))


TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}


def test_tools_are_those_of_a_chat() -> None:
    chat = asked(tools=[TOOL, TOOL | {"name": "g", "strict": True}], parallel_tool_calls=False).chat
    assert [tool.name for tool in chat.tools] == ["f", "g"]
    assert chat.offers_tools and chat.tool_choice.mode == "auto"
    named = asked(tools=[TOOL], tool_choice={"type": "function", "name": "f"}).chat.tool_choice
    assert (named.mode, named.names) == ("required", ("f",))
    some = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}
    assert asked(tools=[TOOL], tool_choice=some).chat.tool_choice.names == ("f",)


def test_calls_in_items() -> None:
    items = [
        USER,
        {"type": "message", "role": "assistant", "content": "let me see"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", "id": "fc_1"},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": '{"a":1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "two"}],
        },
    ]
    told = asked(input=items, tools=[TOOL])
    _, said, *results = told.chat.messages
    assert said.content == "let me see" and [each.call_id for each in said.tool_calls] == [
        "c1",
        "c2",
    ]
    assert [(each.role, each.tool_call_id, each.content) for each in results] == [
        ("tool", "c1", "one"),
        ("tool", "c2", "two"),
    ]
    assert told.places == ((0,), (1, 2, 3), (4,), (5,))


CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "one"}
SAID = {"role": "assistant", "content": "let me see"}


@pytest.mark.parametrize(
    ("items", "param", "words"),
    [
        ([USER, SAID], "input[1].role", "end input with a message of the user"),
        ([USER, OUTPUT], "input[1].call_id", "no function_call right before it"),
        ([USER, CALL, OUTPUT, USER, OUTPUT], "input[4].call_id", "no function_call"),
        ([USER, CALL, OUTPUT | {"call_id": "c2"}], "input[2].call_id", "'c2' is of no"),
        ([USER, SAID, CALL], "input[2].call_id", "'c1' has no function_call_output"),
        ([USER, CALL, USER], "input[1].call_id", "'c1' has no function_call_output"),
        ([USER, CALL, SAID, OUTPUT], "input[1].call_id", "'c1' has no function_call_output"),
        ([USER, CALL, CALL | {"call_id": "c2"}, OUTPUT, USER], "input[2].call_id", "'c2' has no"),
    ],
)
def test_items_that_need_others(items: list[Any], param: str, words: str) -> None:
    error = refusal(input=items, instructions="be brief", tools=[TOOL])
    assert error.param == param and words in error.message
    for word in ("tool_call_id", "tool_calls", "continue_final_message", "messages"):
        assert word not in error.message


@pytest.mark.parametrize(
    ("fault", "name"),
    [({"arguments": "{"}, "arguments"), ({"name": "a b"}, "name"), ({"call_id": ""}, "call_id")],
)
def test_calls_are_refused_by_their_items(fault: dict[str, str], name: str) -> None:
    second = CALL | {"call_id": "c2"} | fault
    output = OUTPUT | {"call_id": second["call_id"]}
    for said in ([], [SAID]):
        items = [USER, *said, CALL, second, OUTPUT, output, USER]
        error = refusal(input=items, instructions="be brief", tools=[TOOL])
        assert error.param == f"input[{len(said) + 2}].{name}"
        assert "function." not in error.message and "messages" not in error.message


def test_an_output_may_be_told_twice() -> None:
    asked(input=[USER, CALL, OUTPUT, OUTPUT, USER], tools=[TOOL])
    asked(input=[USER, CALL, OUTPUT, CALL | {"call_id": "c2"}, OUTPUT | {"call_id": "c2"}])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL | {"name": "a b"}]}, "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tools": [TOOL | {"parameters": 3}]}, "tools[0].parameters"),
        ({"tools": [TOOL | {"color": 3}]}, "tools[0].color"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.mode"),
    ],
)
def test_tools_are_refused_by_their_names_here(fields: Any, param: str) -> None:
    assert refusal(**fields).param == param
