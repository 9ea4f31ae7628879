"""`/set`: values go into requests, out of range they are refused, and the ranges are the API's."""

from __future__ import annotations

from typing import Any

import pytest

from chatserve.cli import sampling_settings
from chatserve.cli.sampling_settings import NAMES, SamplingSettings
from chatserve.protocol import sampling_request
from chatserve.protocol.chat import ChatRequest
from chatserve.settings import fields_of
from tests.unit.cli.test_chat import ScriptedServer, Session


def told(*lines: str, **options: Any) -> list[str]:
    screen = Session(ScriptedServer(), **options).type(*lines)
    return [line for line in screen.splitlines() if not line.startswith("> ")]


def test_values_go_into_each_request_until_they_are_taken_back() -> None:
    session = Session(ScriptedServer(["1"], ["2"], ["3"]), sampling={"temperature": 0.7, "seed": 3})
    assert session.type(
        "/set temperature 0", "!!set top_k 40", "/set seed default", "a",
        "/set temperature default", "/set top_k  default ", "b",
    ) == (
        "> /set temperature 0\ntemperature is 0.0\n"
        "> !!set top_k 40\ntop_k is 40\n"
        "> /set seed default\nseed is 3\n"
        "> a\n1\n"
        "> /set temperature default\ntemperature is 0.7\n"
        "> /set top_k  default \ntop_k is default\n"
        "> b\n2\n> ^D\n"
    )  # fmt: skip
    assert session.server.sampling == [
        {"temperature": 0.0, "seed": 3, "top_k": 40}, {"temperature": 0.7, "seed": 3}
    ]  # fmt: skip


def test_a_limit_that_was_set_comes_before_the_wish() -> None:
    session = Session(ScriptedServer(["1"], ["2"]), wished_max_tokens=512)
    session.type("/set max_tokens 5", "a", "/set max_tokens default", "b")
    assert session.server.sampling == [{"max_tokens": 5}, {"max_tokens": 512}]


def test_stops_are_words_or_quoted_texts() -> None:
    session = Session(ScriptedServer(["1"]))
    screen = session.type("/set stop END '\\n\\nUSER: ' 终", "/set stop", "a")
    assert "stop is END '\\n\\nUSER: ' '终'" in screen
    assert session.server.sampling == [{"stop": ["END", "\n\nUSER: ", "终"]}]


def test_truncation_is_asked_for_while_the_context_rolls() -> None:
    session = Session(ScriptedServer(["1"], ["2"], ["3"]))
    session.type(
        "/set context rolling", "a", "/set context refuse", "b", "/set context default", "c"
    )
    assert session.server.sampling == [{"truncation": "rolling"}, {}, {}]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/set temperature 2.5", "/set temperature: 2.5 is out of range: it must be from 0 to 2"),
        ("/set temperature nan", "/set temperature: nan is out of range: it must be from 0 to 2"),
        ("/set top_p 0", "/set top_p: 0.0 is out of range: it must be over 0 and at most 1"),
        ("/set top_k 1.5", "/set top_k: '1.5' is not a valid int"),
        ("/set max_tokens 0", "/set max_tokens: 0 is out of range: it must be from 1 to"),
        ("/set seed x", "/set seed: 'x' is not a valid int"),
        ("/set context slide", "/set context: 'slide' is not one of refuse, rolling"),
        ("/set clipboard x", "/set clipboard: 'x' is not one of auto, terminal"),
        ("/set stop 'open", '/set stop: "\'open" cannot be read: No closing quotation'),
        ("/set stop ''", "/set stop: a text must have 1 to 256 bytes"),
        ("/set stop " + "x" * 257, "/set stop: a text must have 1 to 256 bytes"),
        ("/set stop " + "x " * 17, "/set stop: these are 17 texts, the limit is 16"),
        ("/set colour red", "there is no setting 'colour'; there are temperature, top_p,"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(line: str, error: str) -> None:
    session = Session(ScriptedServer(["1"]))
    assert f"error: {error}" in session.type(line, "a")
    assert session.server.sampling == [{}]


def test_all_are_listed_with_their_values() -> None:
    rows = told("/set top_p 0.5", "/set", "/set top_p", sampling={"temperature": 0.7})
    assert [row.split()[0] for row in rows[1:-1]] == [*NAMES, "clipboard"]
    assert rows[1].split("  ")[0] == "temperature 0.7" and rows[2].startswith("top_p 0.5 ")
    assert "top_k default " in rows[3] and "context refuse " in rows[-3]
    assert rows[-1] == "top_p 0.5  nucleus sampling"


def test_ranges_are_those_of_the_api() -> None:
    schema = ChatRequest.model_json_schema()["properties"]
    for item in fields_of(SamplingSettings):
        if item.name in ("stop", "context"):
            continue
        (kind,) = (each for each in schema[item.name]["anyOf"] if each["type"] != "null")
        meta = item.metadata
        assert meta["ge"] == kind.get("minimum"), item.name
        assert meta["gt"] == kind.get("exclusiveMinimum"), item.name
        below = kind.get("exclusiveMaximum")
        assert meta["le"] == (below - 1 if below is not None else kind.get("maximum")), item.name
    assert sampling_settings.MAX_STOPS == sampling_request.MAX_STOPS
    assert sampling_settings.MAX_STOP_BYTES == sampling_request.MAX_STOP_BYTES
