"""`--lenient` over HTTP: what was left out stands in a header, of streams and errors too."""

from __future__ import annotations

from typing import Any

import pytest

from chatserve.protocol.leniency import HEADER
from chatserve.server.worker import create_worker_app
from tests.asgi import Answer, running
from tests.fakes import FakeEngine, FakeModel

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


def ask(*, is_lenient: bool, **fields: Any) -> Answer:
    app = create_worker_app(FakeEngine(), FakeModel(), is_lenient=is_lenient)
    with running(app) as api:
        return api.post("/v1/chat/completions", CHAT | fields)


@pytest.mark.parametrize("stream", [False, True])
def test_ignored_fields_are_listed(stream: bool) -> None:
    answer = ask(is_lenient=True, temprature=1, reasoning_effort="low", stream=stream)
    assert answer.status == 200
    assert answer.headers[HEADER] == "reasoning_effort, temprature"


def test_an_error_lists_them_too() -> None:
    answer = ask(is_lenient=True, temprature=1, n=99)
    assert (answer.status, answer.error["param"]) == (400, "n")
    assert answer.headers[HEADER] == "temprature"


def test_no_header_where_nothing_was_ignored() -> None:
    assert HEADER not in ask(is_lenient=True).headers


def test_strict_is_the_default() -> None:
    answer = ask(is_lenient=False, temprature=1)
    assert (answer.status, answer.error["param"]) == (400, "temprature")
    assert answer.error["code"] == "unsupported_parameter" and HEADER not in answer.headers


def test_one_request_does_not_hear_of_another() -> None:
    app = create_worker_app(FakeEngine(), FakeModel(), is_lenient=True)
    with running(app) as api:
        assert HEADER in api.post("/v1/chat/completions", CHAT | {"x": 1}).headers
        assert HEADER not in api.post("/v1/chat/completions", CHAT).headers
