"""Anthropic's messages as chats: what is translated, what is refused and by which name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.protocol.anthropic import (
    COUNT_NO_OPS,
    MESSAGES_NO_OPS,
    AskedMessage,
    parse_count_tokens,
    parse_messages,
)
from chatserve.protocol.anthropic_blocks import ERROR_MARK, read_messages
from chatserve.protocol.chat import MAX_MESSAGES, ChatMessage
from chatserve.protocol.sampling_request import MAX_STOPS
from chatserve.protocol.tools import MAX_TOOLS

USER = {"role": "user", "content": "hi"}
USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "ok"}


def asked(**fields: Any) -> AskedMessage:
    body = {"model": "fake", "max_tokens": 10, "messages": [USER], **fields}
    return parse_messages(json.dumps(body).encode())


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        asked(**fields)
    assert refused.value.param is not None and refused.value.param in refused.value.message
    return refused.value


def text(said: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **fields}


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({}, [("user", "hi")]),
        ({"system": "be brief"}, [("system", "be brief"), ("user", "hi")]),
        (
            {"system": [text("a", cache_control={"type": "ephemeral"}), text("b")]},
            [("system", "a\nb"), ("user", "hi")],
        ),
        (
            {"messages": [{"role": "user", "content": [text("a"), text("b", citations=None)]}]},
            [("user", "a\nb")],
        ),
        ({"messages": [USER, USER]}, [("user", "hi\nhi")]),
    ],
)
def test_blocks_are_messages(fields: Any, messages: list[tuple[str, str]]) -> None:
    assert asked(**fields).chat.messages == [ChatMessage(*each) for each in messages]


def test_the_assistant_s_last_message_is_gone_on_with() -> None:
    chat = asked(messages=[USER, {"role": "assistant", "content": "Once"}]).chat
    assert chat.is_open and chat.messages[-1] == ChatMessage("assistant", "Once")
    assert not asked().chat.is_open


def test_sampling_goes_on() -> None:
    chat = asked(
        temperature=0.5, top_p=0.4, top_k=3, stop_sequences=["a", "b"], stream=True,
        metadata={"user_id": "me"},
    ).chat  # fmt: skip
    assert (chat.temperature, chat.top_p, chat.top_k) == (0.5, 0.4, 3)
    assert (chat.max_tokens, chat.stop, chat.is_stream) == (10, ("a", "b"), True)


def test_tools_in_turns() -> None:
    turns = read_messages(
        [
            USER,
            {"role": "assistant", "content": [text("let me see"), USE]},
            {"role": "user", "content": [RESULT, text("so?")]},
        ]
    )
    call = {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    assert turns.messages[1:] == [
        {"role": "assistant", "content": [text("let me see")], "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "ok"},
        {"role": "user", "content": [text("so?")]},
    ]
    assert turns.sources == ["messages[0]", "messages[1]", "messages[2]", "messages[2]"]


def test_a_failed_tool_says_so() -> None:
    def result(**fields: Any) -> Any:
        content = [{"type": "tool_result", "tool_use_id": "t1", **fields}]
        turns = [{"role": "assistant", "content": [USE]}, {"role": "user", "content": content}]
        return read_messages(turns).messages[1]["content"]

    assert result(content="no file", is_error=True) == ERROR_MARK + "no file"
    assert result(content=[text("a"), text("b")]) == "a\nb"
    assert result() == "" and result(content=[]) == ""


def test_a_schema_for_the_answer() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    config = {"format": {"type": "json_schema", "schema": schema}}
    spec = asked(output_config=config).chat.grammar
    assert spec is not None and spec.kind == "json_schema"
    assert asked(output_config={"effort": None}).chat.grammar is None


def test_max_tokens_is_required() -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_messages(json.dumps({"model": "fake", "messages": [USER]}).encode())
    assert refused.value.param == "max_tokens"
    body = {"model": "fake", "messages": [USER]}
    assert parse_count_tokens(json.dumps(body).encode()).chat.messages == [
        ChatMessage("user", "hi")
    ]


def test_a_beginning_that_cannot_be_gone_on_with_goes_by_its_place() -> None:
    names = asked(messages=[USER, {"role": "assistant", "content": "Once"}], system="x").names
    assert names.of("continue_final_message") == "messages[1]"


CALLED = {"role": "assistant", "content": [text("let me see"), USE]}
ANSWERED = {"role": "user", "content": [RESULT]}
OTHER = {"role": "user", "content": [text("x"), RESULT | {"tool_use_id": "t2"}]}


@pytest.mark.parametrize(
    ("turns", "param", "words"),
    [
        ([OTHER], "messages[0].content[1].tool_use_id", "'t2' is of no tool_use"),
        ([CALLED, {"role": "user", "content": [RESULT, RESULT | {"tool_use_id": "t2"}]}],
         "messages[1].content[1].tool_use_id", "'t2' is of no tool_use"),
        ([CALLED, ANSWERED, USER, ANSWERED],
         "messages[3].content[0].tool_use_id", "'t1' is of no tool_use"),
        ([CALLED, USER], "messages[0].content[1]", "'t1' has no tool_result"),
        ([CALLED, {"role": "user", "content": [text("so?"), RESULT]}],
         "messages[0].content[1]", "'t1' has no tool_result"),
        ([USER, CALLED], "messages[1].content[1]", "'t1' has no tool_result"),
        ([{"role": "assistant", "content": [USE, USE | {"id": "t2"}]}, ANSWERED, CALLED],
         "messages[0].content[1]", "'t2' has no tool_result"),
    ],
)  # fmt: skip
def test_calls_and_results_that_do_not_meet(turns: list[Any], param: str, words: str) -> None:
    error = refusal(messages=turns, system="be brief")
    assert error.param == param and words in error.message
    for word in ("tool_call_id", "tool_calls", "continue_final_message"):
        assert word not in error.message


def test_text_between_and_behind_calls_of_one_message() -> None:
    said = {"role": "assistant", "content": [text("a"), USE, text("b"), USE | {"id": "t2"}]}
    results = {"role": "user", "content": [RESULT, RESULT | {"tool_use_id": "t2"}]}
    messages = asked(messages=[USER, said, results]).chat.messages
    assert [message.role for message in messages] == ["user", "assistant", "tool", "tool"]
    assert messages[1].content == "a\nb"
    assert [call.call_id for call in messages[1].tool_calls] == ["t1", "t2"]


def of(role: str, *blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [USER] * (MAX_MESSAGES + 1)}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [USER | {"name": "x"}]}, "messages[0].name"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (of("user"), "messages[0].content"),
        (of("user", "x"), "messages[0].content[0]"),
        (of("user", {"type": "image", "source": {}}), "messages[0].content[0]"),
        (of("user", {"type": "document"}), "messages[0].content[0]"),
        (of("user", USE), "messages[0].content[0]"),
        (of("assistant", RESULT), "messages[0].content[0]"),
        (of("assistant", {"type": "thinking"}), "messages[0].content[0]"),
        (of("user", {"type": "text"}), "messages[0].content[0].text"),
        (of("user", text("x", color="red")), "messages[0].content[0].color"),
        (of("user", text("x", cache_control=3)), "messages[0].content[0].cache_control"),
        (of("assistant", USE | {"input": "{}"}), "messages[0].content[0].input"),
        (of("assistant", USE | {"id": None}), "messages[0].content[0].id"),
        (of("user", RESULT | {"tool_use_id": 3}), "messages[0].content[0].tool_use_id"),
        (of("user", RESULT | {"is_error": "yes"}), "messages[0].content[0].is_error"),
        (of("user", RESULT | {"content": [{"type": "image"}]}),
         "messages[0].content[0].content[0]"),
        ({"system": 3}, "system"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": [3]}, "stop_sequences"),
        ({"stop_sequences": ["x"] * (MAX_STOPS + 1)}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"metadata": {"name": "x"}}, "metadata.name"),
        ({"metadata": {"user_id": 3}}, "metadata.user_id"),
        ({"metadata": 3}, "metadata"),
        ({"output_config": 3}, "output_config"),
        ({"output_config": {"effort": "high"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"tools": 3}, "tools"),
        ({"tools": [3]}, "tools[0]"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "f", "input_schema": {}}] * (MAX_TOOLS + 1)}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "auto", "name": "f"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": 3}},
         "tool_choice.disable_parallel_tool_use"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
        ({"n": 2}, "n"),
        ({"container": "x"}, "container"),
    ],
)  # fmt: skip
def test_refused_by_name(fields: Any, param: str) -> None:
    assert refusal(**fields).param == param


@pytest.mark.parametrize("name", MESSAGES_NO_OPS)
def test_what_changes_nothing_is_accepted(name: str) -> None:
    for value in MESSAGES_NO_OPS[name]:
        asked(**{name: value})
    assert isinstance(refusal(**{name: "no such value"}), UnsupportedParameter)
    assert name not in COUNT_NO_OPS or MESSAGES_NO_OPS[name] == COUNT_NO_OPS[name]


TOOL = {"name": "f", "input_schema": {"type": "object", "properties": {}}, "description": "x"}


def test_tools_are_those_of_a_chat() -> None:
    chat = asked(tools=[TOOL, TOOL | {"name": "g", "type": "custom"}]).chat
    assert [tool.name for tool in chat.tools] == ["f", "g"] and chat.offers_tools
    single = {"disable_parallel_tool_use": True}
    assert asked(tools=[TOOL], tool_choice={"type": "auto"}).chat.tool_choice.mode == "auto"
    assert asked(tools=[TOOL], tool_choice={"type": "none"}).chat.tool_choice.mode == "none"
    some = asked(tools=[TOOL], tool_choice={"type": "any", **single}).chat.tool_choice
    assert some.mode == "required" and some.names is None
    named = asked(tools=[TOOL], tool_choice={"type": "tool", "name": "f"}).chat.tool_choice
    assert (named.mode, named.names) == ("required", ("f",))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL | {"name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tools": [TOOL | {"input_schema": {"type": "array"}}]}, "tools[0].input_schema.type"),
        ({"tools": [TOOL | {"strict": 3}]}, "tools[0].strict"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
    ],
)
def test_tools_are_refused_by_their_names_here(fields: Any, param: str) -> None:
    assert refusal(**fields).param == param
