"""Pages of other origins: none may use the API but those that are listed, to the letter."""

from __future__ import annotations

from typing import Any

import pytest

from chatserve.errors import UsageError
from chatserve.server.cross_origin import origins
from chatserve.server.edge import AccessPolicy, Edge
from tests.asgi import Answer, request

LISTED = ("https://chat.example", "http://127.0.0.1:3000", "chrome-extension://abcdef")
ORIGINS = (
    "null", "*", "", "https://evil.example", "http://127.0.0.1", "http://127.0.0.1:8000",
    "http://localhost:3000", "https://chat.example.evil.example", "https://evil.chat.example",
    "http://chat.example", "https://chat.example:8443", "https://chat.example/", "file://",
    "https://CHAT.example", "https://chat.example@evil.example", "https://chat.example evil",
    "moz-extension://abcdef", "http://[::1]:3000", "https://chat.example,https://evil.example",
    "https://chаt.example", "HTTPS://chat.example",
)  # fmt: skip
HOST = ("host", "127.0.0.1:8000")


async def answer_all(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
    await send({"type": "http.response.body", "body": b"{}"})


def edge(*allowed: str, **options: Any) -> Edge:
    policy = AccessPolicy.build("127.0.0.1", allow_origins=allowed, **options)
    return Edge(answer_all, policy)


def ask(app: Edge, *headers: tuple[str, str], method: str = "GET") -> Answer:
    encoded = [(name, value.encode().decode("latin-1")) for name, value in headers]
    return request(app, method, "/v1/models", headers=[HOST, *encoded])


def preflight(app: Edge, origin: str, *headers: tuple[str, str]) -> Answer:
    wish = ("access-control-request-method", "POST")
    return ask(app, ("origin", origin), wish, *headers, method="OPTIONS")


def cors(answer: Answer) -> dict[str, str]:
    return {k: v for k, v in answer.headers.items() if k.startswith("access-control-")}


@pytest.mark.parametrize("origin", ORIGINS + LISTED)
def test_no_origin_is_let_in_by_default(origin: str) -> None:
    assert not cors(ask(edge(), ("origin", origin)))
    assert not cors(preflight(edge(), origin))


@pytest.mark.parametrize("origin", ORIGINS)
def test_an_origin_that_is_not_listed_is_not_let_in(origin: str) -> None:
    app = edge(*LISTED, api_keys=["k"])
    assert not cors(ask(app, ("origin", origin), ("authorization", "Bearer k")))
    answer = preflight(app, origin)
    assert not cors(answer) and answer.status == 401


@pytest.mark.parametrize("origin", LISTED)
def test_a_listed_origin_reads_answers_and_refusals(origin: str) -> None:
    app = edge(*LISTED, api_keys=["k"])
    for key, status in (("k", 200), ("wrong", 401)):
        answer = ask(app, ("origin", origin), ("authorization", f"Bearer {key}"))
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in answer.headers
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


def test_a_preflight_comes_before_the_key() -> None:
    app = edge(*LISTED, api_keys=["k"])
    wished = ("access-control-request-headers", "authorization,content-type,x-stainless-os")
    private = ("access-control-request-private-network", "true")
    answer = preflight(app, LISTED[0], wished, private)
    assert (answer.status, answer.body) == (200, b"")
    assert cors(answer) == {
        "access-control-allow-origin": LISTED[0],
        "access-control-allow-methods": "GET, POST, DELETE",
        "access-control-allow-headers": wished[1],
        "access-control-allow-private-network": "true",
        "access-control-max-age": "600",
        "access-control-expose-headers": cors(answer)["access-control-expose-headers"],
    }


@pytest.mark.parametrize("wished", ["a\x00b", "a: b", "é", "x" * 2000])
def test_strange_header_names_are_not_said_again(wished: str) -> None:
    answer = preflight(edge(*LISTED), LISTED[0], ("access-control-request-headers", wished))
    assert answer.status == 200 and "access-control-allow-headers" not in answer.headers


def test_a_preflight_from_a_rebound_name_is_refused() -> None:
    headers = [("host", "evil.example"), ("origin", LISTED[0])]
    wish = ("access-control-request-method", "POST")
    answer = request(edge(*LISTED), "OPTIONS", "/v1/models", headers=[*headers, wish])
    assert (answer.status, answer.error["code"]) == (403, "host_not_allowed")


def test_options_that_is_no_preflight_needs_a_key() -> None:
    app = edge(*LISTED, api_keys=["k"])
    assert ask(app, ("origin", LISTED[0]), method="OPTIONS").status == 401


def test_two_origins_are_none() -> None:
    assert not cors(ask(edge(*LISTED), ("origin", LISTED[0]), ("origin", LISTED[0])))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("*", "list the origins"), ("null", "is no origin"), ("chat.example", "is no origin"),
        ("https://chat.example/", "without a path"), ("https://*.example", "is no origin"),
        ("https://chat.example:443", "leave :443 out"), ("http://a:80", "leave :80 out"),
        ("https://Chat.example", "is no origin"), ("https://a@b", "is no origin"),
        ("https://", "is no origin"), ("https://a:", "is no origin"),
        ("https://a b", "is no origin"), ("", "is no origin"),
    ],
)  # fmt: skip
def test_what_cannot_be_listed(value: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        AccessPolicy.build("127.0.0.1", allow_origins=[value])


def test_what_can_be_listed() -> None:
    for value in (*LISTED, "https://a:8443", "http://[::1]:3000", "tauri://localhost"):
        assert origins([value]) == {value.encode()}
