"""Every answer has an id that can be found in the log: the client's own, or a new one."""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from chatserve.protocol.anthropic import MESSAGES_PATH
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.error_response import install_error_handlers
from chatserve.server.log_lines import formatter
from chatserve.server.request_id import (
    HEADER,
    MAX_LEN,
    answering,
    current_request_id,
    given_or_new,
)
from chatserve.server.worker import create_worker_app
from tests.asgi import RunningApp, request, running
from tests.fakes import FakeEngine, FakeModel

MADE = re.compile("req_[0-9a-f]{32}")
HOST = ("host", "127.0.0.1")
JSON = ("content-type", "application/json")
CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def api() -> Iterator[RunningApp]:
    with running(create_worker_app(FakeEngine(), FakeModel())) as api:
        yield api


def headers_of(*given: str) -> list[tuple[bytes, bytes]]:
    return [(b"accept", b"*/*"), *((HEADER.encode(), each.encode("latin-1")) for each in given)]


@pytest.mark.parametrize("given", ["a", "req_1", "Ab-9._:/+=@~!", "x" * MAX_LEN])
def test_what_is_taken_over(given: str) -> None:
    assert given_or_new(headers_of(given)) == given


@pytest.mark.parametrize(
    "given",
    [
        "", " ", "two words", "a\tb", "a\nfinish=stop", "a\r\nset-cookie: x", "\x1b[31m", "a\x00",
        "a\x7f", "ä", "x" * (MAX_LEN + 1), " a", "a\n",
    ],
)  # fmt: skip
def test_what_is_not(given: str) -> None:
    assert MADE.fullmatch(given_or_new(headers_of(given)))


def test_none_and_two_are_no_id() -> None:
    made = {given_or_new(headers_of(*given)) for given in ([], [], ["a", "b"])}
    assert len(made) == 3 and all(map(MADE.fullmatch, made))


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", CHAT, 200),
        ("POST", "/v1/chat/completions", CHAT | {"stream": True}, 200),
        ("POST", "/v1/completions", {"model": "fake", "prompt": "a", "n": 2, "stream": True}, 200),
        ("POST", "/v1/responses", {"model": "fake", "input": "hi", "stream": True}, 200),
        (
            "POST", MESSAGES_PATH,
            {"model": "fake", "max_tokens": 5, "messages": CHAT["messages"], "stream": True}, 200,
        ),
        ("POST", "/v1/chat/completions", {}, 400),
        ("POST", "/v1/chat/completions", CHAT | {"model": "other"}, 404),
        ("PUT", "/v1/models", {}, 405),
        ("GET", "/v1/models", None, 200),
        ("HEAD", "/v1/models", None, 200),
        ("GET", "/v1/nothing", None, 404),
        ("GET", "/health/live", None, 200),
    ],
)  # fmt: skip
def test_every_answer_has_it(
    api: RunningApp, method: str, path: str, body: Any, status: int
) -> None:
    data = b"" if body is None else json.dumps(body).encode()
    answer = api.request(method, path, data, headers=[JSON, (HEADER, "mine-1")])
    assert (answer.status, answer.headers[HEADER]) == (status, "mine-1")
    # Anthropic's SDKs look for it elsewhere
    assert ("request-id" in answer.headers) == (path == MESSAGES_PATH)
    assert MADE.fullmatch(api.request(method, path, data, headers=[JSON]).headers[HEADER])


@pytest.mark.parametrize(
    "headers", [[("host", "evil.example")], [HOST, ("content-type", "text/plain")], [HOST, JSON]]
)
def test_who_is_not_let_in_is_told_one(headers: list[tuple[str, str]]) -> None:
    policy = AccessPolicy.build("127.0.0.1", api_keys=["key"])
    app = create_worker_app(FakeEngine(), FakeModel(), policy=policy)
    answer = request(app, "POST", "/v1/chat/completions", headers=headers, body=[b"{}"])
    assert answer.status in (401, 403, 415) and MADE.fullmatch(answer.headers[HEADER])


def test_a_bug_is_told_one() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError(current_request_id())

    app = FastAPI()
    install_error_handlers(app)
    app.mount("/", broken)
    answer = request(Edge(app, AccessPolicy()), headers=[HOST, (HEADER, "mine-3")], raises=KeyError)
    assert (answer.status, answer.headers[HEADER]) == (500, "mine-3")


@pytest.mark.parametrize("body", [CHAT, CHAT | {"stream": True}])
def test_the_line_of_the_request_has_it(
    api: RunningApp, body: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "chatserve")
    data = json.dumps(body).encode()
    api.request("POST", "/v1/chat/completions", data, headers=[JSON, (HEADER, "mine-2")])
    forged = "a\nchatcmpl-1 request=b finish=stop"
    answer = api.request("POST", "/v1/chat/completions", data, headers=[JSON, (HEADER, forged)])
    first, second = (line for line in caplog.messages if line.startswith("chatcmpl-"))
    assert " request=mine-2 model=fake " in first
    assert f" request={answer.headers[HEADER]} model=fake " in second
    assert "request=b" not in caplog.text


def test_requests_side_by_side_do_not_mix(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "chatserve")
    engine = FakeEngine(step_s=0)
    with running(create_worker_app(engine, FakeModel())) as api:

        async def all_at_once() -> list[str]:
            data = json.dumps(CHAT | {"stream": True}).encode()
            calls = (
                api.call("POST", "/v1/chat/completions", data, headers=[JSON, (HEADER, f"r{i}")])
                for i in range(8)
            )
            return [answer.headers[HEADER] for answer in await asyncio.gather(*calls)]

        assert api.runner.run(all_at_once()) == [f"r{i}" for i in range(8)]
    logged = [re.search(r"request=(\S+)", line) for line in caplog.messages]
    assert sorted(found[1] for found in logged if found) == [f"r{i}" for i in range(8)]


def test_every_json_line_within_a_request_has_it() -> None:
    lines = formatter("json", "worker m")
    record = logging.makeLogRecord({"name": "chatserve.x", "levelname": "INFO", "msg": "hm"})

    async def send(_message: Any) -> None: ...

    def within() -> dict[str, Any]:
        answering({"path": "/", "headers": headers_of("mine-4")}, send)
        fields: dict[str, Any] = json.loads(lines.format(record))
        return fields

    assert contextvars.copy_context().run(within)["request"] == "mine-4"
    assert "request" not in json.loads(lines.format(record))
