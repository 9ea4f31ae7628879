"""Every error has a row, and every answer the one shape."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from chatserve.errors import (
    ChatserveError,
    ContextLengthExceeded,
    InvalidAPIKey,
    InvalidRequest,
    NoWorkerAvailable,
    Overloaded,
    ShuttingDown,
    StartupError,
)
from chatserve.server.error_response import (
    STATUSES,
    error_body,
    error_event,
    error_response,
    install_error_handlers,
    status_of,
)
from tests.asgi import Answer, request

JSON = ("content-type", "application/json")


def subclasses(kind: type[ChatserveError]) -> Iterator[type[ChatserveError]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def test_every_error_that_can_reach_http_has_a_row() -> None:
    kinds = {kind for kind in subclasses(ChatserveError) if not issubclass(kind, StartupError)}
    assert kinds == set(STATUSES)


def test_codes_are_distinct() -> None:
    codes = [kind.code for kind in STATUSES]
    assert len(set(codes)) == len(codes)


def test_a_child_without_a_row_takes_its_parents() -> None:
    class Special(ContextLengthExceeded):
        pass

    assert status_of(Special("x")) == (400, "invalid_request_error")
    assert status_of(StartupError("x")) == (500, "server_error")


def test_shape() -> None:
    error = ContextLengthExceeded("too long", param="messages")
    expected = (
        b'{"error":{"message":"too long (Input tokens exceed the configured limit)",'
        b'"type":"invalid_request_error",'
        b'"param":"messages","code":"context_length_exceeded"}}'
    )
    assert error_body(error) == expected
    assert error_event(error) == b"data: " + expected + b"\n\n"


def test_a_bug_says_nothing_of_itself() -> None:
    body = error_body(ValueError("secret prompt"))
    assert b"secret" not in body and b'"code":"internal_error"' in body


def test_lone_surrogate_in_a_message() -> None:
    assert b'"message":"no ?"' in error_body(InvalidRequest("no \udc80"))


def test_headers_that_go_with_a_status() -> None:
    assert error_response(Overloaded("full", retry_after_s=7)).headers["retry-after"] == "7"
    assert error_response(NoWorkerAvailable("soon")).headers["retry-after"] == "1"
    assert error_response(ShuttingDown("bye")).headers["retry-after"] == "5"
    assert error_response(InvalidAPIKey("who?")).headers["www-authenticate"] == "Bearer"
    assert "retry-after" not in error_response(InvalidRequest("no")).headers


class Body(BaseModel):
    n: int


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    install_error_handlers(app)

    @app.post("/typed")
    async def typed(body: Body) -> int:
        return body.n

    @app.get("/full")
    async def full() -> None:
        raise Overloaded("full", retry_after_s=3)

    @app.get("/bug")
    async def bug() -> None:
        raise ValueError("secret")

    return app


def check(answer: Answer, status: int, code: str) -> None:
    assert answer.status == status
    assert answer.error["code"] == code
    assert answer.headers["content-type"] == "application/json"


def test_unknown_route(app: FastAPI) -> None:
    answer = request(app, path="/nope")
    check(answer, 404, "not_found")
    assert "/nope" in answer.error["message"]


def test_wrong_method(app: FastAPI) -> None:
    answer = request(app, "DELETE", "/typed")
    check(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def test_fastapis_422_becomes_400(app: FastAPI) -> None:
    answer = request(app, "POST", "/typed", headers=[JSON], body=[b'{"n":"x"}'])
    check(answer, 400, "invalid_value")
    assert answer.error["param"] == "n" and answer.error["message"].startswith("n should be")


def test_ours(app: FastAPI) -> None:
    answer = request(app, path="/full")
    check(answer, 429, "rate_limit_exceeded")
    assert answer.headers["retry-after"] == "3"


def test_bug(app: FastAPI) -> None:
    answer = request(app, path="/bug", raises=ValueError)
    check(answer, 500, "internal_error")
    assert b"secret" not in answer.body
