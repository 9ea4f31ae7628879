"""/tokenize and /detokenize: what is accepted, and what is refused by which name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.protocol.tokens import MAX_TOKENS, parse_detokenize, parse_tokenize

MESSAGES = [{"role": "user", "content": "hi"}]


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def test_a_text_and_a_chat() -> None:
    text = parse_tokenize(body(prompt="", add_special_tokens=False, tools=[]))
    assert (text.model, text.prompt, text.add_special_tokens) == (None, "", False)
    chat = parse_tokenize(body(model="m", messages=MESSAGES, add_generation_prompt=False))
    assert chat.messages is not None and chat.messages[0].content == "hi"
    tools = [{"type": "function", "function": {"name": "f"}}]
    offered = parse_tokenize(body(messages=MESSAGES, tools=tools)).tools
    assert [tool.definition for tool in offered] == tools


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"prompt": "a", "continue_final_message": False}, "continue_final_message"),
        (
            {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
        (
            {"prompt": "a", "tools": [{"type": "function", "function": {"name": "f"}}]},
            "tools",
        ),
        ({"messages": MESSAGES, "tools": [{}]}, "tools[0].type"),
        ({"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ({"prompt": "a", "model": 1}, "model"),
        ({"prompt": "a", "model": "m" * 501}, "model"),
    ],
)
def test_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_tokenize(body(**fields))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("name", "value"),
    [("chat_template", "x"), ("other", 1)],
)
def test_what_is_not_supported_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedParameter, match=name):
        parse_tokenize(body(messages=MESSAGES, **{name: value}))


@pytest.mark.parametrize("count", [0, 1, MAX_TOKENS])
def test_so_many_ids(count: int) -> None:
    assert len(parse_detokenize(body(tokens=[7] * count)).tokens) == count


@pytest.mark.parametrize("tokens", [[7] * (MAX_TOKENS + 1), None, "7", ["7"], [7.0], [True]])
def test_what_are_no_ids(tokens: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_detokenize(body(tokens=tokens))
    assert caught.value.param == "tokens"
