"""Who may come in: host, key, media type, size, and the drained door."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

import pytest

from chatserve.errors import UsageError
from chatserve.server import edge as edge_module
from chatserve.server.edge import AccessPolicy, Edge, check_exposure, is_loopback
from tests.asgi import Answer, request

HOST = ("host", "127.0.0.1:8000")
JSON = ("content-type", "application/json")
OPEN = ("/health/live", "/health/ready", "/health/decode")


class Echo:
    """An app that reads the whole body and says how long it was."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.num_calls += 1
        num_bytes, more = 0, True
        while more:
            message = await receive()
            num_bytes += len(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(num_bytes).encode()})


def edge(host: str = "127.0.0.1", **options: Any) -> Edge:
    return Edge(Echo(), AccessPolicy.build(host, **options), max_body_bytes=100)


def get(app: Edge, path: str = "/v1/models", *headers: tuple[str, str]) -> Answer:
    return request(app, path=path, headers=[HOST, *headers])


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:1", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:65535", "[::1]",
     "[::1]:8000", "chat.example:8000", "chat.example"],
)  # fmt: skip
def test_host_that_is_allowed(host: str) -> None:
    app = edge(allow_hosts=["chat.example"])
    assert request(app, headers=[("host", host)]).status == 200


@pytest.mark.parametrize(
    "hosts",
    [
        [], [""], ["evil.example"], ["localhost.evil.example"], ["evil.localhost"],
        ["127.0.0.1.evil.example"], ["localhost."], ["127.0.0.1."], ["127.0.0.2"], ["127.1"],
        ["2130706433"], ["0.0.0.0"], ["::1"], ["[::1"], ["::1]"], ["[::1].evil.example"],
        ["[::ffff:127.0.0.1]"], ["localhost:80:80"], ["localhost:"], ["localhost:x"],
        ["localhost:٣"], [":8000"], ["127.0.0.1@evil.example"], ["evil.example@127.0.0.1"],
        ["127.0.0.1 evil"], ["127.0.0.1,evil.example"], ["127.0.0.1/x"], ["http://127.0.0.1"],
        ["127.0.0.1", "127.0.0.1"], ["localhost", "evil.example"], ["a.local"], ["a.internal"],
        ["10.0.0.1"], ["192.168.1.1:8000"], ["[fe80::1]"],
    ],
)  # fmt: skip
def test_host_that_is_not(hosts: list[str]) -> None:
    encoded = [("host", host.encode().decode("latin-1")) for host in hosts]
    for path in ("/v1/models", *OPEN):
        app = edge()
        answer = request(app, path=path, headers=encoded)
        assert (answer.status, answer.error["code"]) == (403, "host_not_allowed")
        assert app.app.num_calls == 0  # type: ignore[attr-defined]  # Echo


def test_loopback_address_it_listens_on_is_allowed() -> None:
    assert request(edge("127.0.0.5"), headers=[("host", "127.0.0.5:80")]).status == 200


def test_public_address_has_no_host_check() -> None:
    app = edge("0.0.0.0", api_keys=["k"])
    headers = [("host", "anything"), ("authorization", "Bearer k")]
    assert request(app, headers=headers).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/", "/v1/models", "//v1/models", "/V1/models", "/v1/models/", "/health", "/health/",
        "/health/live/", "/health/live/../../v1/models", "/health//live", "/Health/live",
        "/health/live;x", "/health/live\x00", "/health/live ", "/openapi.json", "/docs",
        "/metrics", "/health/live%2f", "/v1/health/live", "/controls", "/control",
    ],
)  # fmt: skip
def test_everything_but_health_needs_a_key(path: str) -> None:
    app = edge(api_keys=["k1", "k2"], control_token="t")
    assert get(app, path).status == 401
    assert get(app, path, ("authorization", "Bearer t")).status == 401
    assert get(app, path, ("authorization", "Bearer k2")).status == 200


@pytest.mark.parametrize("path", OPEN)
def test_health_is_open(path: str) -> None:
    assert get(edge(api_keys=["k"]), path).status == 200


@pytest.mark.parametrize(
    "values",
    [
        [], [""], ["k1"], ["Bearer"], ["Bearer "], ["Bearer k"], ["Bearer k11"], ["Basic k1"],
        ["Bearer k1", "Bearer k1"], ["Bearer kö"], ["Bearer k1 k2"], ["Bearer k1,k2"],
    ],
)  # fmt: skip
def test_wrong_key(values: list[str]) -> None:
    app = edge(api_keys=["k1", "k2"])
    answer = get(app, "/v1/models", *(("authorization", value) for value in values))
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert app.app.num_calls == 0  # type: ignore[attr-defined]  # Echo


@pytest.mark.parametrize(
    ("headers", "is_right"),
    [
        ([("x-api-key", "k1")], True),
        ([("x-api-key", " k1 ")], True),
        ([("x-api-key", "Bearer k1")], False),
        ([("x-api-key", "k")], False),
        ([("x-api-key", "k1"), ("x-api-key", "k1")], False),
        # Authorization counts, whatever else there is
        ([("authorization", "Bearer k1"), ("x-api-key", "no")], True),
        ([("authorization", "Bearer no"), ("x-api-key", "k1")], False),
        ([("authorization", "x"), ("authorization", "y"), ("x-api-key", "k1")], False),
    ],
)
def test_key_in_anthropic_s_header(headers: list[tuple[str, str]], is_right: bool) -> None:
    status = get(edge(api_keys=["k1"]), "/v1/models", *headers).status
    assert status == (200 if is_right else 401)


def test_key_of_other_letters() -> None:
    app = edge(api_keys=["schlüssel"])
    given = "schlüssel".encode().decode("latin-1")
    assert get(app, "/v1/models", ("authorization", f"bearer {given}")).status == 200


@pytest.mark.parametrize("token", ["k2", "wrong", ""])
def test_every_key_is_compared(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def spy(a: bytes, b: bytes) -> bool:
        calls.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    get(edge(api_keys=["k1", "k2", "k3"]), "/v1/models", ("authorization", f"Bearer {token}"))
    assert len(calls) == 3
    assert {len(side) for call in calls for side in call} == {32}


def test_control_needs_its_own_token() -> None:
    path = "/control/register"
    app = edge(control_token="t")
    assert get(app).status == 200
    assert get(app, path).status == 401
    assert get(app, path, ("authorization", "Bearer t")).status == 200
    assert get(edge(api_keys=["k"]), path, ("authorization", "Bearer k")).status == 401


def post(app: Edge, *headers: tuple[str, str], body: list[bytes] | None = None) -> Answer:
    return request(app, "POST", "/x", headers=[HOST, *headers], body=body or [b"{}"])


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "Application/JSON ;x"]
)
def test_json_is_read(kind: str) -> None:
    assert post(edge(), ("content-type", kind)).body == b"2"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("content-type", "text/plain")],
        [("content-type", "text/plain; application/json")],
        [("content-type", "application/x-www-form-urlencoded")],
        [("content-type", "multipart/form-data; boundary=x")],
        [("content-type", "application/jsonx")],
        [("content-type", "application/json; charset=utf-16")],
        [("content-type", 'application/json; Charset="ISO-8859-1"')],
        [JSON, JSON],
        [JSON, ("content-encoding", "gzip")],
        [JSON, ("content-encoding", "identity, br")],
    ],
)
def test_anything_but_plain_json_is_refused(headers: list[tuple[str, str]]) -> None:
    app = edge()
    answer = post(app, *headers)
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")
    assert app.app.num_calls == 0  # type: ignore[attr-defined]  # Echo


def test_no_body_needs_no_media_type() -> None:
    """What has none may be meant for a route that takes none, or for none at all."""
    assert post(edge(), body=[b""]).body == b"0"
    assert post(edge(), ("content-type", "text/plain"), body=[b""]).status == 415


def test_no_cors_header_for_any_origin() -> None:
    for origin in ("http://127.0.0.1:3000", "null", "https://evil.example"):
        answer = get(edge(), "/v1/models", ("origin", origin))
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_declared_body_over_the_limit_is_not_read() -> None:
    app = edge()
    answer = post(app, JSON, ("content-length", "101"))
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert app.app.num_calls == 0  # type: ignore[attr-defined]  # Echo


@pytest.mark.parametrize("length", ["9" * 30, "²", "-1", "x"])
def test_strange_length(length: str) -> None:
    expected = 413 if length.startswith("9") else 200
    assert post(edge(), JSON, ("content-length", length)).status == expected


def test_body_at_the_limit_is_read() -> None:
    assert post(edge(), JSON, body=[b"x" * 60, b"x" * 40]).body == b"100"


def test_undeclared_body_is_counted_while_it_is_read() -> None:
    app = edge()
    answer = post(app, JSON, body=[b"x" * 60, b"x" * 41, b"never read"])
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert app.app.num_calls == 0  # type: ignore[attr-defined]  # Echo


def test_draining_refuses_requests_and_answers_health() -> None:
    app = edge(control_token="t")
    app.drain()
    answer = get(app)
    assert (answer.status, answer.error["code"]) == (503, "server_shutting_down")
    assert int(answer.headers["retry-after"]) >= 1
    for path in ("/health/ready", "/metrics", "/admin/status", "/admin/models"):
        assert get(app, path).status == 200
    assert get(app, "/admin/models/load").status != 200
    assert get(app, "/control/leave", ("authorization", "Bearer t")).status == 200


def test_draining_while_a_body_runs_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_module, "BODY_TIMEOUT_S", 0.0)
    app = edge()
    scope = {"type": "http", "method": "POST", "path": "/v1", "headers": [(b"host", b"localhost")]}
    statuses: list[int] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    async def check() -> None:
        asking = asyncio.create_task(app(scope, receive, send))
        while not any(reading.expired() for reading in app._readings):
            await asyncio.sleep(0)
        app.drain()
        await asking

    asyncio.run(check())
    assert statuses == [503]


def test_requests_under_way_are_counted() -> None:
    counts: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        counts.append(outer.num_in_flight)
        raise KeyError

    outer = Edge(app, AccessPolicy())
    for path, expected in (
        ("/v1/models", 1), ("/health/live", 0), ("/admin/models", 0), ("/control/x", 0),
    ):  # fmt: skip
        headers = [HOST, ("authorization", "Bearer t")]
        if path == "/control/x":
            outer = Edge(app, AccessPolicy.build("127.0.0.1", control_token="t"))
        with pytest.raises(KeyError):
            request(outer, path=path, headers=headers)
        assert counts.pop() == expected
        assert outer.num_in_flight == 0


def test_websockets_are_closed() -> None:
    import asyncio

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    asyncio.run(edge()({"type": "websocket", "path": "/v1"}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


LOOPBACK = ("127.0.0.1", "127.9.9.9", "::1", "localhost")
PUBLIC = (
    "0.0.0.0",
    "::",
    "192.168.1.5",
    "10.0.0.1",
    "example.com",
    "localhost.evil",
    "",
    "fe80::1",
)


def test_loopback() -> None:
    assert all(map(is_loopback, LOOPBACK))
    assert not any(map(is_loopback, PUBLIC))


@pytest.mark.parametrize("host", PUBLIC)
def test_public_address_needs_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="CHATSERVE_API_KEYS"):
        check_exposure(host, has_key=False)
    check_exposure(host, has_key=True)
    check_exposure(host, has_key=False, insecure_no_auth=True)


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_needs_none(host: str) -> None:
    check_exposure(host, has_key=False)
