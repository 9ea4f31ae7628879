"""The events of a Responses stream, as tables: which, in what order, and what they add up to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import orjson
import pytest

from chatserve.engine.sequence import SamplingParams, TokenEvent, TokenLogprobs
from chatserve.errors import GenerationFailed, InvalidRequest, Overloaded
from chatserve.models.tool_format import LLAMA_3, TAGS, ToolFormat
from chatserve.server.answer_events import Event, frames
from chatserve.server.choices import Piece, choices_of
from chatserve.server.deltas import ToolCallDelta
from chatserve.server.preparation import Prepared, Prompt
from chatserve.server.response_events import ResponseEncoder
from tests.fakes import FakeTokenizer

EVENT = TokenEvent("x")
USAGE = {"total_tokens": 3}
FIRST_CALL = ToolCallDelta(0, "call_1", "f", '{"a":')
LOGPROBS = {
    "content": [{"token": "a", "logprob": -1.0, "bytes": None,
                 "top_logprobs": [{"token": "b", "logprob": -2.0, "bytes": [98]}]}],
    "refusal": None,
}  # fmt: skip


def encoder(*, shows_logprobs: bool = False) -> ResponseEncoder:
    return ResponseEncoder({"id": "resp_1"}, lambda: USAGE, shows_logprobs=shows_logprobs)


def story(pieces: Sequence[Piece], encoder: ResponseEncoder) -> list[Event]:
    events = [*encoder.start()]
    for piece in pieces:
        events += encoder.feed(piece, EVENT)
    return [*events, *encoder.finish()]


def names(events: Iterable[Event]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


TEXT = [
    "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
    "content_part.done", "output_item.done",
]  # fmt: skip
CALL = [
    "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
    "output_item.done",
]  # fmt: skip
EMPTY = [name for name in TEXT if name != "output_text.delta"]


@pytest.mark.parametrize(
    ("pieces", "middle"),
    [
        ([Piece("hi", None, "stop")], TEXT),
        ([Piece("", None, "stop")], EMPTY),
        ([Piece("h"), Piece(""), Piece("i"), Piece("", None, "stop")],
         [*TEXT[:3], "output_text.delta", *TEXT[3:]]),
        ([Piece("", tool_calls=[FIRST_CALL]), Piece("", None, "tool_calls")], CALL),
        ([Piece("so: ", tool_calls=[FIRST_CALL]), Piece("", None, "tool_calls")], TEXT + CALL),
        ([Piece("", tool_calls=[FIRST_CALL]), Piece("and"), Piece("", None, "tool_calls")],
         CALL + TEXT),
        ([Piece("", tool_calls=[FIRST_CALL]),
          Piece("", tool_calls=[ToolCallDelta(0, None, None, "1}")]),
          Piece("", tool_calls=[ToolCallDelta(1, "call_2", "g", "{}")]),
          Piece("", None, "tool_calls")],
         [*CALL[:2], "function_call_arguments.delta", *CALL[2:], *CALL]),
    ],
)  # fmt: skip
def test_order(pieces: list[Piece], middle: list[str]) -> None:
    events = story(pieces, encoder())
    assert names(events) == ["created", "in_progress", *middle, "completed"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    # relays find the number there
    assert all(list(event)[-1] == "sequence_number" for event in events)


def test_each_event_names_its_item() -> None:
    said = encoder()
    call, rest = FIRST_CALL, ToolCallDelta(0, None, None, "1}")
    pieces = [
        Piece("hi", tool_calls=[call]),
        Piece("", tool_calls=[rest], finish_reason="tool_calls"),
    ]
    events = story(pieces, said)
    message, call_item = said.response["output"]
    assert message == {
        "id": message["id"], "type": "message", "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": "hi", "annotations": []}],
    }  # fmt: skip
    assert call_item == {
        "id": call_item["id"], "type": "function_call", "status": "completed",
        "call_id": "call_1", "name": "f", "arguments": '{"a":1}',
    }  # fmt: skip
    for event in events:
        if "output_index" in event:
            expected = said.response["output"][event["output_index"]]["id"]
            assert (event.get("item_id") or event["item"]["id"]) == expected
    added = [event["item"] for event in events if event["type"].endswith("item.added")]
    assert [item["status"] for item in added] == ["in_progress", "in_progress"]
    assert added[0]["content"] == [] and added[1]["arguments"] == ""
    done = [event for event in events if event["type"].endswith("arguments.done")]
    assert done[0]["arguments"] == '{"a":1}' and done[0]["name"] == "f"


def test_snapshots_say_how_far_it_is() -> None:
    said = encoder()
    events = story([Piece("hi", None, "stop")], said)
    first, last = events[0]["response"], events[-1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    assert last == said.response
    assert (last["status"], last["usage"], last["error"]) == ("completed", USAGE, None)
    assert last["completed_at"] > 0 and first["completed_at"] is None


def test_an_answer_that_is_cut_is_incomplete() -> None:
    said = encoder()
    events = story([Piece("hi", None, "length")], said)
    assert names(events)[-1] == "incomplete"
    assert said.response["status"] == "incomplete"
    assert said.response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert said.response["output"][0]["status"] == "incomplete"
    assert (
        story([Piece("", None, "length")], nothing := encoder()) and not nothing.response["output"]
    )


def test_a_call_that_a_stop_text_cut_is_incomplete() -> None:
    """Nobody can go on from half of its arguments."""
    said = encoder()
    events = story([Piece("", tool_calls=[FIRST_CALL]), Piece("", None, "stop")], said)
    assert names(events)[-1] == "completed"
    [call] = said.response["output"]
    assert (call["status"], call["arguments"]) == ("incomplete", '{"a":')


def test_a_cancelled_answer() -> None:
    said = encoder()
    said.feed(Piece("hi"), EVENT)
    events = [*said.cancel()]
    assert names(events) == [*TEXT[3:], "incomplete"]
    assert said.response["status"] == "cancelled" and said.has_ended
    assert said.response["incomplete_details"] is None
    assert said.response["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (GenerationFailed("no luck"), "server_error", "no luck"),
        (Overloaded("full"), "rate_limit_exceeded", "full"),
        (InvalidRequest("bad", param="input"), "invalid_prompt", "bad"),
        (ValueError("secret"), "server_error", "internal error; the server's log says more"),
    ],
)
def test_a_failed_answer(error: Exception, code: str, message: str) -> None:
    said = encoder()
    said.feed(Piece("hi"), EVENT)
    [event] = said.fail(error)
    assert event["type"] == "response.failed" and event["response"]["status"] == "failed"
    assert event["response"]["error"] == {"code": code, "message": message}
    assert event["response"]["output"][0]["content"][0]["text"] == "hi"
    assert event["response"]["output"][0]["status"] == "incomplete"


def test_logprobs_are_told_with_their_text_and_at_its_end() -> None:
    said = encoder(shows_logprobs=True)
    pieces = [Piece("a", LOGPROBS), Piece("", LOGPROBS, "stop")]
    events = story(pieces, said)
    token = {
        "token": "a", "logprob": -1.0, "bytes": [],
        "top_logprobs": [{"token": "b", "logprob": -2.0, "bytes": [98]}],
    }  # fmt: skip
    deltas = [event for event in events if event["type"].endswith("text.delta")]
    assert [(each["delta"], each["logprobs"]) for each in deltas] == [("a", [token]), ("", [token])]
    [done] = [event for event in events if event["type"].endswith("text.done")]
    assert done["logprobs"] == [token, token]
    assert said.response["output"][0]["content"][0]["logprobs"] == [token, token]


def told_as_bytes(tool_format: ToolFormat, text: str) -> list[dict[str, Any]]:
    """The items of an answer with a token for each of its bytes, and their logprobs."""
    params = SamplingParams(logprobs=0)
    prepared = Prepared(
        "m", (Prompt((1,), params),), 1, True, True, False, False, shows_logprobs=True,
        tool_format=tool_format,
    )  # fmt: skip
    [choice] = choices_of(prepared, FakeTokenizer(), "id")
    said = encoder(shows_logprobs=True)
    for number, byte in enumerate(text.encode(), 1):
        event = TokenEvent(
            "x", text=chr(byte), token_ids=(byte,), num_generated_tokens=number,
            logprobs=(TokenLogprobs(byte, -0.5),),
            finish_reason="stop" if number == len(text.encode()) else None,
        )  # fmt: skip
        said.feed(choice.feed(event), event)
    assert names(said.finish())[-1] == "completed"
    output: list[dict[str, Any]] = said.response["output"]
    return output


def test_logprobs_neither_begin_nor_end_an_item() -> None:
    [call] = told_as_bytes(LLAMA_3, '{"name": "f", "parameters": {"a": 1}}')
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "f", '{"a": 1}')
    text = 'Hi <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    message, call = told_as_bytes(TAGS, text)
    assert (call["name"], call["arguments"]) == ("f", '{"a": 1}')
    [part] = message["content"]
    assert part["text"] == "Hi"
    assert [each["token"] for each in part["logprobs"]] == ["H", "i"]


def test_logprobs_wait_for_their_text() -> None:
    said = encoder(shows_logprobs=True)
    events = story([Piece("", LOGPROBS), Piece("é", LOGPROBS), Piece("", None, "length")], said)
    [delta] = [event for event in events if event["type"].endswith("text.delta")]
    assert delta["delta"] == "é" and len(delta["logprobs"]) == 2


def test_frames() -> None:
    event = {"type": "x.y", "delta": "a\nb", "sequence_number": 0}
    assert frames([event, event]) == 2 * (b"event: x.y\ndata: " + orjson.dumps(event) + b"\n\n")
