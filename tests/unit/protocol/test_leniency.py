"""What a lenient server does with fields that it would refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.protocol.chat import ChatRequest, parse_chat
from chatserve.protocol.leniency import MAX_NAMES, IgnoredFields, noting

USER = {"role": "user", "content": "hi"}


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [USER], **fields}).encode()


def lenient(**fields: Any) -> tuple[ChatRequest, str]:
    with noting() as ignored:
        return parse_chat(body(**fields)), str(ignored)


PLAIN = parse_chat(body())


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, ""),
        ({"temprature": 1}, "temprature"),
        ({"b": 1, "a": 2}, "b, a"),
        ({"service_tier": "flex", "store": False}, "service_tier"),
        ({"messages": [{**USER, "x": 1, "refusal": "no"}]}, "messages[0].refusal, messages[0].x"),
    ],
)
def test_ignored_fields_change_nothing_and_are_named(fields: dict[str, Any], names: str) -> None:
    assert lenient(**fields) == (PLAIN, names)


def test_options_of_a_stream() -> None:
    request, names = lenient(stream=True, stream_options={"include_usage": True, "x": 1})
    assert request.includes_usage and names == "stream_options.x"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 3},
        {"user": 5},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"messages": [{"role": "wizard", "content": "hi"}]},
    ],
)
def test_a_wrong_value_of_a_known_field_is_refused_all_the_same(fields: dict[str, Any]) -> None:
    with noting(), pytest.raises(InvalidRequest):
        parse_chat(body(**fields))


def test_strict_again_afterwards() -> None:
    with noting():
        pass
    with pytest.raises(UnsupportedParameter):
        parse_chat(body(x=1))


def test_a_header_can_hold_every_name() -> None:
    ignored = IgnoredFields()
    for name in ("a,b", "x\r\ny: z", "naïve", "\ud800", "messages[3].x"):
        ignored.add(name)
    assert str(ignored) == "a%2Cb, x%0D%0Ay:%20z, na%C3%AFve, %3F, messages[3].x"


def test_a_million_fields_are_a_short_header() -> None:
    ignored = IgnoredFields()
    for i in range(1_000):
        ignored.add(f"{i:03}" + "x" * 1000)
    assert str(ignored).endswith(f", and {1_000 - MAX_NAMES} more")
    assert len(str(ignored)) < 4000
