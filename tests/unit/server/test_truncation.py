"""Turns that gave way are told in usage, whole and streamed, and in headers; nothing else is."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatserve.errors import ContextLengthExceeded, InvalidRequest
from chatserve.server.preparation import prepare_chat
from chatserve.server.truncation import in_ranges, out_of_ranges
from chatserve.server.upstream import PASSED_HEADERS
from chatserve.server.worker import create_worker_app
from tests.fakes import FakeEngine, FakeModel
from tests.servers import RunningServer, serving

MESSAGES = [
    {"role": role, "content": text * 40}
    for role, text in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
]
MODEL = FakeModel(context_length=150)
FULL = sum(len(f"<{m['role']}>{m['content']}") for m in MESSAGES)
LAST = len("<user>") + 40


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": MESSAGES, **fields}


@pytest.fixture(scope="module")
def server() -> Any:
    with serving(lambda: create_worker_app(FakeEngine(step_s=0), MODEL)) as server:
        yield server


def post(server: RunningServer, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=body(**fields), trust_env=False)


DROPPED = {"prompt_tokens_dropped": FULL - LAST, "messages_dropped": [0, 1, 2]}
HEADERS = {
    "x-chatserve-prompt-tokens-dropped": str(FULL - LAST),
    "x-chatserve-messages-dropped": "0-2",
}


def test_in_a_whole_answer(server: RunningServer) -> None:
    reply = post(server, truncation="rolling")
    usage = reply.json()["usage"]
    assert usage.items() >= {**DROPPED, "prompt_tokens": LAST}.items()
    assert reply.headers.items() >= HEADERS.items()


@pytest.mark.parametrize("has_usage", [True, False])
def test_in_a_stream(server: RunningServer, has_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if has_usage else {}
    reply = post(server, truncation="rolling", stream=True, **options)
    assert reply.headers.items() >= HEADERS.items()
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line[:7] == "data: {"]
    if has_usage:
        assert events[-1]["usage"].items() >= DROPPED.items()
    else:
        assert "usage" not in reply.text


def test_nothing_dropped_is_said_only_where_it_could_have_been(server: RunningServer) -> None:
    short = [{"role": "user", "content": "hi"}]
    rolling = post(server, truncation="rolling", messages=short)
    assert rolling.json()["usage"].items() >= {
        "prompt_tokens_dropped": 0, "messages_dropped": [],
    }.items()  # fmt: skip
    plain = post(server, messages=short)
    assert not set(DROPPED) & plain.json()["usage"].keys()
    for reply in (rolling, plain):
        assert not HEADERS.keys() & reply.headers.keys()


@pytest.mark.parametrize("truncation", [None, "disabled"])
def test_without_it_a_chat_that_is_too_long_is_refused(truncation: str | None) -> None:
    with pytest.raises(ContextLengthExceeded, match=str(FULL)):
        prepare_chat(json.dumps(body(truncation=truncation)).encode(), MODEL)


def test_a_history_of_any_length_may_give_way() -> None:
    """Only its last turn has to fit: bytes that cannot fit are no reason to refuse it."""
    messages = [{"role": "user", "content": "x" * 3000}, *MESSAGES[3:]]
    with pytest.raises(ContextLengthExceeded, match="bytes"):
        prepare_chat(json.dumps(body(messages=messages)).encode(), MODEL)
    prepared = prepare_chat(
        json.dumps(body(messages=messages, truncation="rolling")).encode(), MODEL
    )
    assert prepared.rolled is not None and prepared.rolled.messages_dropped == (0,)


@pytest.mark.parametrize("value", ["auto", "", 1, True, ["rolling"]])
def test_other_values_are_refused_by_name(value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prepare_chat(json.dumps(body(truncation=value)).encode(), MODEL)
    assert caught.value.param == "truncation"


@pytest.mark.parametrize(
    ("places", "text"),
    [((0,), "0"), ((1, 2, 3), "1-3"), ((0, 2, 3, 7), "0,2-3,7"), ((4, 6), "4,6")],
)
def test_places_in_short(places: tuple[int, ...], text: str) -> None:
    assert in_ranges(places) == text and tuple(out_of_ranges(text)) == places


@given(st.sets(st.integers(0, 40), min_size=1))
def test_no_place_is_lost(places: set[int]) -> None:
    assert out_of_ranges(in_ranges(sorted(places))) == sorted(places)


def test_the_headers_pass_the_controller() -> None:
    assert HEADERS.keys() <= set(PASSED_HEADERS)
