"""Connections that come in floods, drop by drop or as junk, while others are served."""

from __future__ import annotations

import json
import selectors
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from chatserve.server import connection
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.worker import create_worker_app
from tests.fakes import FakeEngine, FakeModel
from tests.servers import RunningServer, http_request, read_all, read_until, send_raw, serving

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
LIVE = http_request("GET", "/health/live")
WAIT_S = 30.0
DROP_S = 0.05


@contextmanager
def worker(limit: int = 256, *, keys: tuple[str, ...] = ()) -> Iterator[RunningServer]:
    policy = AccessPolicy.build("127.0.0.1", api_keys=keys)

    def build() -> Edge:
        return create_worker_app(FakeEngine(step_s=0), FakeModel(), policy=policy)

    with serving(build, max_connections=limit) as server:
        yield server


@pytest.fixture(scope="module")
def house() -> Iterator[RunningServer]:
    """Of the tests that leave it as it was."""
    with worker() as server:
        yield server


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def drip(
    server: RunningServer,
    stack: ExitStack,
    number: int,
    whole: bytes,
    is_over: Callable[[], bool],
    start: bytes = b"",
) -> int:
    """Send `start` over so many connections, and then a byte of `whole` now and then.

    Returns how many the server has closed.

    Goes on until it has closed all, or `is_over`.
    """
    socks = [stack.enter_context(send_raw(server.port, start)) for _ in range(number)]
    closed = 0
    with selectors.DefaultSelector() as selector:
        for sock in socks:
            selector.register(sock, selectors.EVENT_READ)
        deadline = time.monotonic() + WAIT_S
        for byte in whole:
            if closed == number or is_over():
                break
            for key in list(selector.get_map().values()):
                try:
                    key.fileobj.send(bytes([byte]))  # type: ignore[union-attr]  # a socket
                except OSError:
                    closed += 1
                    selector.unregister(key.fileobj)
            for key, _ in selector.select(DROP_S):
                try:
                    is_end = not key.fileobj.recv(65536)  # type: ignore[union-attr]  # a socket
                except OSError:
                    is_end = True
                if is_end:
                    closed += 1
                    selector.unregister(key.fileobj)
            assert time.monotonic() < deadline
    return closed


def served(server: RunningServer, number: int) -> None:
    with httpx.Client(base_url=server.url, timeout=WAIT_S) as client:
        for _ in range(number):
            assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


HEAD = b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 2_000
REST = b"x" * 2_000
POST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: 100000\r\n\r\n"
)


def test_two_hundred_slow_heads_are_closed_while_others_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 0.5)
    with worker() as server, ExitStack() as stack:
        rounds = iter(range(10))

        def serve_one() -> bool:
            if next(rounds, None) is not None:
                served(server, 2)
            return False

        assert drip(server, stack, 200, HEAD, serve_one) == 200
        assert next(rounds, None) is None or len(server.connections) == 0
        served(server, 1)


def test_without_the_deadline_slow_heads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 3600)
    with worker() as server, ExitStack() as stack:
        rounds = iter(range(15))
        assert drip(server, stack, 20, HEAD, lambda: next(rounds, None) is None) == 0


def test_a_slow_head_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 0.05)
    with worker() as server:
        head, _, body = read_all(send_raw(server.port, HEAD[:30])).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ") and b"connection: close" in head
        assert json.loads(body)["error"]["code"] == "headers_too_slow"
        # who says nothing at all is told nothing, and neither is who sends only line ends
        assert read_all(send_raw(server.port, b"")) == b""
        assert read_all(send_raw(server.port, b"\r\n\r\n")) == b""


def test_a_head_has_its_time_anew_for_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with worker() as server, send_raw(server.port, b"") as sock:
        for _ in range(3):
            for byte in LIVE:
                sock.sendall(bytes([byte]))
            assert read_until(sock, b"}").startswith(b"HTTP/1.1 200 ")
        monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 0.1)
        sock.sendall(LIVE[:20])
        assert read_until(sock, b"\r\n\r\n").startswith(b"HTTP/1.1 408 ")


def test_a_body_that_nobody_reads_has_an_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal goes out before the body is in; the rest of it may not drip for ever."""
    monkeypatch.setattr(connection, "BODY_TIMEOUT_S", 0.5)
    with worker(keys=("k",)) as server, ExitStack() as stack:
        assert drip(server, stack, 20, REST, lambda: False, POST) == 20
        until(lambda: len(server.connections) == 0)
    monkeypatch.setattr(connection, "BODY_TIMEOUT_S", 3600)
    with worker(keys=("k",)) as server, ExitStack() as stack:
        rounds = iter(range(25))
        assert drip(server, stack, 5, REST, lambda: next(rounds, None) is None, POST) == 0


def request_with(*lines: bytes) -> bytes:
    return b"\r\n".join((b"GET /health/live HTTP/1.1", b"Host: 127.0.0.1", *lines, b"", b""))


@pytest.mark.parametrize(
    ("head", "is_allowed"),
    [
        (request_with(*(b"x-%d: y" % i for i in range(99))), True),
        (request_with(*(b"x-%d: y" % i for i in range(100))), False),
        (request_with(*(b"x-%d: y" % i for i in range(10_000))), False),
        (request_with(b"x: " + b"y" * 32_000), True),
        (request_with(b"x: " + b"y" * 32_768), False),
        (request_with(b"x" * 40_000 + b": y"), False),
        (b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", False),
        (b"GET /health/live?" + b"x" * 32_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", True),
    ],
    ids=["100 headers", "101", "10,000", "32,000 bytes", "over 32 KiB", "name", "url", "query"],
)
def test_headers_at_their_limits(house: RunningServer, head: bytes, is_allowed: bool) -> None:
    with send_raw(house.port, b"") as sock:
        try:
            sock.sendall(head)
        except OSError:
            assert not is_allowed
        answer, _, body = read_until(sock, b"}").partition(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 " if is_allowed else b"HTTP/1.1 431 ")
        if not is_allowed:
            assert json.loads(body + read_all(sock))["error"]["code"] == "headers_too_large"


def test_without_limits_headers_have_none(
    house: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_HEADERS", 10**9)
    monkeypatch.setattr(connection, "MAX_HEADER_BYTES", 10**9)
    for head in (
        request_with(*(b"x-%d: y" % i for i in range(10_000))),
        request_with(b"x: " + b"y" * 1_000_000),
    ):
        with send_raw(house.port, head) as sock:
            assert read_until(sock, b"}").startswith(b"HTTP/1.1 200 ")


def flood(server: RunningServer, start: bytes, num_bytes: int) -> int:
    """Send `start` and then filler without an end; how much went out before it was cut."""
    sent = 0
    with send_raw(server.port, start) as sock:
        try:
            while sent < num_bytes:
                sent += sock.send(b"x" * 65_536)
        except OSError:
            pass
    return sent


def test_a_head_without_an_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LINGER_S", 0.05)
    start = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "
    with worker() as server:
        for begin in (start, b"GET /", b"x" * 100_000, b"\r\n" * 100_000):
            assert flood(server, begin, 64 << 20) < 64 << 20
            until(lambda: len(server.connections) == 0)
        served(server, 1)


def test_over_the_limit_the_longest_rest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REST_S", 0.0)
    with worker(8) as server, ExitStack() as stack:
        slow = [stack.enter_context(send_raw(server.port, HEAD[:20])) for _ in range(8)]
        until(lambda: len(server.connections) == 8)
        served(server, 3)
        # the eldest went, the youngest stayed
        assert slow[0].recv(100) == b""
        slow[7].setblocking(False)
        with pytest.raises(BlockingIOError):
            slow[7].recv(1)


def test_where_all_are_at_work_a_new_one_is_told_to_come_back() -> None:
    engine = FakeEngine(["a"], hangs=True)

    def build() -> Edge:
        return create_worker_app(engine, FakeModel())

    request = http_request("POST", "/v1/chat/completions", CHAT | {"stream": True})
    with serving(build, max_connections=4) as server, ExitStack() as stack:
        for _ in range(4):
            read_until(stack.enter_context(send_raw(server.port, request)), b'"a"')
        for _ in range(3):
            for body in (CHAT, CHAT | {"user": "x" * 1_000_000}):
                named = {"x-request-id": "mine"}
                asked = http_request("POST", "/v1/chat/completions", body, headers=named)
                head, _, told = read_all(send_raw(server.port, asked)).partition(b"\r\n\r\n")
                assert b"x-request-id: mine" in head.lower()
                assert head.startswith(b"HTTP/1.1 429 ") and b"retry-after: 1" in head.lower()
                assert json.loads(told)["error"]["code"] == "rate_limit_exceeded"


def test_a_flood_over_the_flood_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REST_S", 3600)
    monkeypatch.setattr(connection, "REFUSAL_TIMEOUT_S", 3600)
    with worker(4) as server, ExitStack() as stack:
        socks = [stack.enter_context(send_raw(server.port, b"")) for _ in range(9)]
        assert socks[8].recv(1) == b""
        assert len(server.connections) == 8
        # there is room again once somebody leaves
        socks[0].close()
        until(lambda: len(server.connections) == 7)
        served(server, 1)


JUNK = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,
    b"\x00" * 100, b"HELO x\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n x: folded\r\n\r\n", b"GET / HTTP/1.1\r\nH\x00st: a\r\n\r\n",
    b"\x80\x04\x95" + b"x" * 50, b'{"jsonrpc": "2.0"}\r\n\r\n',
)  # fmt: skip


@pytest.mark.parametrize("junk", JUNK)
def test_junk_is_refused_in_the_shape_of_any_error(house: RunningServer, junk: bytes) -> None:
    head, _, body = read_all(send_raw(house.port, junk)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"connection: close" in head
    assert head.count(b"x-request-id: req_") == 1
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")
    served(house, 1)


def test_junk_behind_a_request_does_not_get_into_its_answer() -> None:
    engine = FakeEngine(["a", "b"], step_s=0.01)

    def build() -> Edge:
        return create_worker_app(engine, FakeModel())

    request = http_request("POST", "/v1/chat/completions", CHAT | {"stream": True})
    with serving(build) as server:
        answer = read_all(send_raw(server.port, request + b"\x00\x01 junk\r\n\r\n"))
        assert answer.count(b"HTTP/1.1") == 1 and answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_who_asks_for_another_protocol_is_answered_in_this_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    with worker() as server:
        request = http_request("GET", "/health/live", headers=upgrade)
        with send_raw(server.port, request) as sock:
            assert read_until(sock, b"}").startswith(b"HTTP/1.1 200 ")
    assert not [each for each in caplog.records if each.name.startswith("uvicorn")]
