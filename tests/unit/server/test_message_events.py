"""The events of an Anthropic stream, as tables: which, in what order, and what they add up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from chatserve.engine.sequence import TokenEvent
from chatserve.errors import (
    ChatserveError,
    GenerationFailed,
    InvalidRequest,
    NoWorkerAvailable,
    Overloaded,
)
from chatserve.server.answer_events import Event
from chatserve.server.choices import Piece
from chatserve.server.deltas import ToolCallDelta
from chatserve.server.message_events import MessageEncoder
from chatserve.server.stop_sequence import StopSequence
from tests.fakes import FakeTokenizer

USAGE = {"input_tokens": 3, "cache_read_input_tokens": 1, "output_tokens": 2}
EVENT = TokenEvent("x")
CALL = ToolCallDelta(0, "toolu_1", "f", '{"a":')
REST = ToolCallDelta(0, None, None, "1}")


def encoder(*stops: str) -> MessageEncoder:
    stop = StopSequence(FakeTokenizer(), stops, strip_leading_space=False)
    return MessageEncoder("msg_1", "fake", "fp", lambda: USAGE, stop)


def story(pieces: Sequence[Piece], encoder: MessageEncoder) -> list[Event]:
    events = [*encoder.start()]
    for piece in pieces:
        events += encoder.feed(piece, EVENT)
    return [*events, *encoder.finish()]


def blocks(events: Sequence[Event]) -> list[tuple[str, int]]:
    prefix = "content_block_"
    return [
        (event["type"].removeprefix(prefix), event["index"]) for event in events if "index" in event
    ]


@pytest.mark.parametrize(
    ("pieces", "expected", "reason"),
    [
        ([Piece("hi", None, "stop")], [("start", 0), ("delta", 0), ("stop", 0)], "end_turn"),
        ([Piece("", None, "stop")], [], "end_turn"),
        (
            [Piece("h"), Piece(""), Piece("i", None, "length")],
            [("start", 0), ("delta", 0), ("delta", 0), ("stop", 0)],
            "max_tokens",
        ),
        (
            [Piece("so", tool_calls=[CALL]), Piece("", None, "tool_calls", tool_calls=[REST])],
            [("start", 0), ("delta", 0), ("stop", 0), ("start", 1), ("delta", 1), ("delta", 1),
             ("stop", 1)],
            "tool_use",
        ),
        (
            [Piece("", tool_calls=[CALL, REST]), Piece("so"),
             Piece("", tool_calls=[ToolCallDelta(1, "t2", "g")]), Piece("", None, "tool_calls")],
            [("start", 0), ("delta", 0), ("delta", 0), ("stop", 0), ("start", 1), ("delta", 1),
             ("stop", 1), ("start", 2), ("stop", 2)],
            "tool_use",
        ),
    ],
)  # fmt: skip
def test_order(pieces: list[Piece], expected: list[Any], reason: str) -> None:
    said = encoder()
    first, *middle, delta, last = story(pieces, said)
    assert first["type"] == "message_start" and first["message"]["stop_reason"] is None
    assert first["message"]["content"] == []
    assert first["message"]["usage"]["cache_read_input_tokens"] is None, "nobody knows yet"
    assert blocks(middle) == expected and len(middle) == len(expected)
    assert delta["type"] == "message_delta" and delta["usage"] == USAGE
    assert delta["delta"] == {"stop_reason": reason, "stop_sequence": None}
    assert last == {"type": "message_stop"}
    assert said.message["stop_reason"] == reason


def test_blocks_are_what_their_deltas_add_up_to() -> None:
    said = encoder()
    pieces = [
        Piece("s"),
        Piece("o", tool_calls=[CALL]),
        Piece("", None, "tool_calls", tool_calls=[REST]),
    ]
    events = story(pieces, said)
    text, use = said.message["content"]
    assert text == {"type": "text", "text": "so"}
    assert use == {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}}
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert starts == [{"type": "text", "text": ""}, {**use, "input": {}}]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert deltas == [
        {"type": "text_delta", "text": "s"},
        {"type": "text_delta", "text": "o"},
        {"type": "input_json_delta", "partial_json": '{"a":'},
        {"type": "input_json_delta", "partial_json": "1}"},
    ]


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ('{"a":', {}),
        ('{"a":1,"b":"x', {"a": 1}),
        ('{"a":{"c":[1,2', {"a": {"c": [1, 2]}}),
        ("", {}),
        ("[1", {}),
        ("{x", {}),
    ],
)
def test_a_call_that_is_cut_has_what_is_complete(arguments: str, seen: Any) -> None:
    said = encoder()
    call = ToolCallDelta(0, "toolu_1", "f", arguments)
    story([Piece("", None, "length", tool_calls=[call])], said)
    assert said.message["content"][0]["input"] == seen
    assert said.message["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (GenerationFailed("x"), "api_error"),
        (Overloaded("x"), "rate_limit_error"),
        (NoWorkerAvailable("x"), "overloaded_error"),
        (InvalidRequest("x"), "invalid_request_error"),
        (ValueError("x"), "api_error"),
    ],
)
def test_an_error_is_the_last_event(error: Exception, kind: str) -> None:
    [event] = encoder().fail(error)
    message = (
        "x" if isinstance(error, ChatserveError) else "internal error; the server's log says more"
    )
    assert event == {"type": "error", "error": {"type": kind, "message": message}}


def said(text: str, shown: str, reason: Any = None) -> TokenEvent:
    return TokenEvent("x", text=shown, token_ids=tuple(text.encode()), finish_reason=reason)


@pytest.mark.parametrize(
    ("events", "found"),
    [
        ([said("a", "a"), said("END", "", "stop")], "END"),
        ([said("a EN", "a "), said("D and", "", "stop")], "END"),
        ([said("a EN", "a "), said("X", "ENX"), said("", "", "stop")], None),
        ([said("a", "a"), said("\x07", "", "stop")], None),
        ([said("a", "a"), said("END", "", "length")], None),
        ([said("a", "a"), said("ENDING", "", "stop")], "ENDING"),
        ([said("wör", "wör"), said("</s>", "", "stop")], None),
    ],
)
def test_which_stop_sequence(events: list[TokenEvent], found: str | None) -> None:
    stop = StopSequence(FakeTokenizer(), ["END", "ENDING", "no"], strip_leading_space=False)
    for event in events:
        stop.feed(event)
    assert stop.found == found


def test_a_stop_sequence_is_a_reason() -> None:
    message = encoder("END")
    message.feed(Piece("a"), said("aEND", "a"))
    message.feed(Piece("", None, "stop"), said("", "", "stop"))
    *_, delta, _ = message.finish()
    assert delta["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "END"}
