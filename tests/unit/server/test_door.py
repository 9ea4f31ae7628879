"""The door of a worker: refused before a word is read, and no place is lost."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from chatserve.engine.admission import Admission
from chatserve.errors import GenerationFailed
from chatserve.server.edge import AccessPolicy
from chatserve.server.worker import create_worker_app
from tests.asgi import Answer, request
from tests.fakes import FakeEngine, FakeModel

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi", "max_tokens": 3},
    "/v1/messages": {**CHAT, "max_tokens": 3},
    "/v1/responses": {"input": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/v1/score": {"text_1": "a", "text_2": "b"},
}
NO_BODY = b'{"this is no JSON'


def ask(engine: FakeEngine, path: str, body: bytes, key: str = "", keys: Any = ()) -> Answer:
    policy = AccessPolicy.build("127.0.0.1", api_keys=keys)
    app = create_worker_app(engine, FakeModel(), policy=policy)
    headers = [("host", "127.0.0.1"), ("content-type", "application/json")]
    if key:
        headers.append(("authorization", f"Bearer {key}"))
    return request(app, "POST", path, headers=headers, body=[body])


def asked(path: str, **more: Any) -> bytes:
    return json.dumps({"model": "fake", **BODIES[path], **more}).encode()


def full(engine: FakeEngine) -> FakeEngine:
    engine.admission = Admission(1, 1)
    for _ in range(2):
        engine.admission.add(b"")
    return engine


@pytest.mark.parametrize("path", BODIES)
def test_a_full_house_does_not_read_what_it_refuses(path: str) -> None:
    engine = full(FakeEngine())
    answer = ask(engine, path, NO_BODY)
    assert answer.status == 429 and int(answer.headers["retry-after"]) >= 1
    error = json.loads(answer.body)["error"]
    assert "waiting already" in error["message"]
    if path != "/v1/messages":
        assert error["code"] == "rate_limit_exceeded"
    assert not engine.submitted
    # teeth: where there is a place, the same body is read
    assert ask(FakeEngine(), path, NO_BODY).status == 400


def test_it_is_refused_before_its_body_has_come() -> None:
    engine = full(FakeEngine())
    app = create_worker_app(engine, FakeModel())
    sent = []

    async def never() -> Any:
        raise AssertionError("the body was asked for")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
    }  # fmt: skip
    asyncio.run(app(scope, never, send))
    assert sent[0]["status"] == 429


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("ending", ["answered", "failed", "refused"])
def test_its_place_is_given_back_however_it_ends(path: str, ending: str) -> None:
    engine = FakeEngine(error=GenerationFailed("planted") if ending == "failed" else None)
    body = NO_BODY if ending == "refused" else asked(path)
    statuses = {"answered": 200, "failed": 500, "refused": 400}
    assert ask(engine, path, body).status == statuses[ending]
    assert engine.admission._total == 0 and not engine.admission._counts


@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens"])
def test_what_takes_no_place_is_answered_in_a_full_house(path: str) -> None:
    body = {"/tokenize": {"prompt": "hi"}, "/v1/messages/count_tokens": CHAT}[path]
    answer = ask(full(FakeEngine()), path, json.dumps({"model": "fake", **body}).encode())
    assert answer.status == 200


def test_keys_are_told_apart_and_on_an_open_server_none_is_believed() -> None:
    path = "/v1/chat/completions"
    keys = ("a", "b")
    limits = Admission(1, 8, 1)
    engine = FakeEngine()
    engine.admission = limits
    assert ask(engine, path, asked(path), "a", keys).status == 200
    share = engine.submitted[-1].salt
    assert share
    limits.add(share)
    assert ask(engine, path, asked(path), "a", keys).status == 429
    assert ask(engine, path, asked(path), "b", keys).status == 200
    assert ask(engine, path, asked(path), "a").status == 200


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("priority", ["interactive", "batch", None])
def test_the_priority_goes_to_the_engine(path: str, priority: str | None) -> None:
    engine = FakeEngine()
    assert ask(engine, path, asked(path, priority=priority)).status == 200
    assert set(engine.priorities.values()) == {priority or "interactive"}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("priority", ["", "urgent", "Batch", 0, True, ["batch"], {"a": 1}])
def test_a_priority_that_is_none_is_refused_by_name(path: str, priority: Any) -> None:
    engine = FakeEngine()
    answer = ask(engine, path, asked(path, priority=priority))
    assert answer.status == 400 and b"priority" in answer.body
    assert not engine.submitted
