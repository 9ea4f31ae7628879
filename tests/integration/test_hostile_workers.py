"""Whoever would like to be a worker, and what is sent to one: nobody is called but who calls."""

from __future__ import annotations

import json
import pickle
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import httpx
import orjson
import pytest

from chatserve.protocol.control import bearer
from chatserve.server import listener
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.model_slot import ModelSlot
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_slot_app
from tests.fakes import FakeEngine, FakeModel
from tests.servers import RunningServer, ScriptedWorker, http_request, read_all, send_raw, serving

TOKEN = "control-token"
STATUS = {"state": "ready", "models": [{"name": "fake", "created": 1}]}
REGISTER = "/control/register"
SERVER_THREAD = "server"


class Calls:
    """Where the servers of this process have connected to, heard from the interpreter itself."""

    def __init__(self) -> None:
        self.addresses: list[Any] = []
        self.is_listening = False

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if (
            event in ("socket.connect", "socket.getaddrinfo")
            and self.is_listening
            and threading.current_thread().name == SERVER_THREAD
        ):
            self.addresses.append(arguments[1] if event == "socket.connect" else arguments[:2])

    def connected(self) -> list[Any]:
        return [each for each in self.addresses if isinstance(each[1], int)]


_CALLS = Calls()
sys.addaudithook(_CALLS.hear)


@pytest.fixture
def calls() -> Iterator[Calls]:
    _CALLS.addresses.clear()
    _CALLS.is_listening = True
    yield _CALLS
    _CALLS.is_listening = False


@pytest.fixture
def registry() -> WorkerRegistry:
    return WorkerRegistry(time.monotonic, expected=["fake"])


def house(registry: WorkerRegistry) -> Callable[[], Edge]:
    return lambda: create_controller_app(registry, control_token=TOKEN)


@pytest.fixture
def controller(registry: WorkerRegistry) -> Iterator[RunningServer]:
    with serving(house(registry)) as server:
        yield server


def registration(listens_on: int, **changes: Any) -> dict[str, Any]:
    return {"worker_id": "w", "port": listens_on, "status": STATUS, **changes}


NOTHING = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
METADATA = "169.254.169.254"
FIELDS: list[dict[str, Any]] = [
    {"host": METADATA}, {"url": f"http://{METADATA}/latest/meta-data/"}, {"address": METADATA},
    {"base_url": "file:///etc/passwd"}, {"worker_name": "http://evil.example"},
    {"worker_addr": "gopher://127.0.0.1:25/"}, {"scheme": "file"}, {"uds": "/run/docker.sock"},
    {"port": f"80@{METADATA}"}, {"port": "80/../.."}, {"port": "80#"}, {"port": 0}, {"port": -1},
    {"port": 65536}, {"port": 1.5}, {"port": True}, {"port": [80]},
    {"worker_id": "../x"}, {"worker_id": "a\r\nb"}, {"worker_id": ""}, {"worker_id": "x" * 65},
    {"worker_id": None}, {"status": None}, {"status": {**STATUS, "state": "root"}},
    {"status": {**STATUS, "models": []}}, {"check_heart_beat": True},
    {"status": {**STATUS, "models": [{"name": "a\r\nb", "created": 1}]}},
    {"status": {**STATUS, "models": [{"name": "a", "created": 1, "base_url": "http://evil"}]}},
]  # fmt: skip
TOKENS = (
    None,
    "",
    "wrong",
    TOKEN + "x",
    TOKEN[:-1],
    TOKEN.upper(),
    "older-token",
    "Bearer " + TOKEN,
)


def test_hostile_registrations_call_nobody(
    controller: RunningServer, registry: WorkerRegistry, calls: Calls
) -> None:
    with ScriptedWorker([NOTHING]) as target, httpx.Client(base_url=controller.url) as client:
        for changes in FIELDS:
            body = registration(target.port, **changes)
            answer = client.post(REGISTER, json=body, headers=dict(bearer(TOKEN)))
            assert answer.status_code == 400, changes
        for token in TOKENS:
            headers = {} if token is None else {"Authorization": f"Bearer {token}".strip()}
            answer = client.post(REGISTER, json=registration(target.port), headers=headers)
            assert answer.status_code == 401, token
        for host in (METADATA, "evil.example", "localhost.evil.example"):
            headers = {**bearer(TOKEN), "Host": host}
            answer = client.post(REGISTER, json=registration(target.port), headers=headers)
            assert answer.status_code == 403, host
        assert target.requests == []
    assert calls.addresses == [] and registry.worker_ids() == []


def test_the_controller_s_own_calls_are_heard(controller: RunningServer, calls: Calls) -> None:
    """Or the test above would prove nothing."""
    with ScriptedWorker([NOTHING]) as target:
        body = registration(target.port)
        httpx.post(f"{controller.url}{REGISTER}", json=body, headers=dict(bearer(TOKEN)))
        assert ("127.0.0.1", target.port) in calls.addresses


ELSEWHERE = "127.0.0.9"
FORWARDED = (
    {"X-Forwarded-For": ELSEWHERE}, {"X-Forwarded-For": f"{ELSEWHERE}, 127.0.0.1"},
    {"Forwarded": f"for={ELSEWHERE}"}, {"X-Real-IP": ELSEWHERE}, {"X-Forwarded-Host": ELSEWHERE},
    {"True-Client-IP": ELSEWHERE}, {"X-Forwarded-Proto": "https", "X-Forwarded-Port": "1"},
)  # fmt: skip


def test_headers_name_no_other_host(controller: RunningServer, calls: Calls) -> None:
    ports = []
    for headers in FORWARDED:
        with ScriptedWorker([NOTHING]) as target:
            answer = httpx.post(
                f"{controller.url}{REGISTER}", json=registration(target.port),
                headers={**bearer(TOKEN), **headers},
            )  # fmt: skip
            assert answer.status_code == 403
            assert len(target.requests) == 1
            ports.append(target.port)
    assert calls.connected() == [("127.0.0.1", port) for port in ports]


def test_behind_uvicorn_s_own_defaults_they_do(
    registry: WorkerRegistry, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = listener.uvicorn.Config

    def with_defaults(*arguments: Any, **options: Any) -> Any:
        del options["proxy_headers"]
        return config(*arguments, **options)

    monkeypatch.setattr(listener.uvicorn, "Config", with_defaults)
    with serving(house(registry)) as controller, ScriptedWorker([NOTHING]) as target:
        headers = {**bearer(TOKEN), **FORWARDED[0]}
        body = registration(target.port)
        httpx.post(f"{controller.url}{REGISTER}", json=body, headers=headers)
    assert (ELSEWHERE, target.port) in calls.addresses


def test_a_redirect_leads_nowhere(controller: RunningServer, calls: Calls) -> None:
    for status in (301, 302, 303, 307, 308):
        away = f"HTTP/1.1 {status} Away\r\nLocation: http://{ELSEWHERE}:1/\r\n\r\n".encode()
        with ScriptedWorker([away]) as target:
            answer = httpx.post(
                f"{controller.url}{REGISTER}", json=registration(target.port),
                headers=dict(bearer(TOKEN)),
            )  # fmt: skip
            assert answer.status_code == 403
    assert not [address for address in calls.addresses if address[0] != "127.0.0.1"]


def frames(random: Random) -> Iterator[bytes]:
    """What other engines' sockets take, and noise; none of it with the token."""
    body = {"model": "fake", "prompt": "hi"}
    call = {"method": "abort", "args": ["x"]}
    while True:
        yield random.randbytes(random.randrange(1, 400))
        yield pickle.dumps(call, protocol=random.randrange(6)) + b"\r\n\r\n"
        # a pickle that runs a command, behind the length that multiprocessing sends
        evil = b"cos\nsystem\n(S'touch /tmp/pwned'\ntR."
        yield struct.pack("!i", len(evil)) + evil
        # the greeting of ZeroMQ
        yield b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48) + random.randbytes(20)
        yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + random.randbytes(100)
        yield orjson.dumps(call) + b"\n"
        yield b"\x82" + random.randbytes(30)
        path = random.choice(("/v1/completions", "/control/register", "/internal/resume", "/"))
        token = random.choice(("", "wrong", "control-toke", "%00", "a" * 5000))
        yield http_request("POST", path, body, headers={"Authorization": f"Bearer {token}"})
        yield http_request(random.choice(("GET", "PUT", "TRACE", "CONNECT", "PRI")), path)
        whole = http_request("POST", path, body, headers=dict(bearer(token)))
        spoilt = bytearray(whole)
        for _ in range(random.randrange(1, 8)):
            spoilt[random.randrange(len(spoilt))] = random.randrange(256)
        yield bytes(spoilt)


def test_a_thousand_frames_at_a_worker_s_port(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(step_s=0)
    policy = AccessPolicy.build("127.0.0.1", api_keys=[TOKEN], control_token=TOKEN)

    def build() -> Edge:
        slot = ModelSlot.filled(engine, FakeModel())
        return create_slot_app(slot, policy=policy, control_token=TOKEN)

    random = Random(28)
    with serving(build) as worker:
        for number, frame in zip(range(1_000), frames(random), strict=False):
            sock = send_raw(worker.port, frame)
            try:
                sock.shutdown(socket.SHUT_WR)
                answer = read_all(sock)
            except OSError:
                answer = b""
            finally:
                sock.close()
            status = answer[9:10]
            assert not answer or (answer.startswith(b"HTTP/1.1 ") and status == b"4"), (
                number, frame, answer[:200],
            )  # fmt: skip
        assert engine.submitted == []
        answer = httpx.post(
            f"{worker.url}/v1/completions", json={"model": "fake", "prompt": "hi"},
            headers=dict(bearer(TOKEN)),
        )  # fmt: skip
        assert answer.status_code == 200 and len(engine.submitted) == 1
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


TRICKS = (
    "//v1/models", "/v1//models", "/V1/models", "/v1/models/", "/v1/./models", "/v1/../v1/models",
    "/%76%31/models", "/v1%2fmodels", "/v1/models%00", "/v1/models%20", "/v1/models;x=1",
    "/v1/models?health=live", "/v1/models#/health/live", "/health/live/../../v1/models",
    "/health/live%2f..%2f..%2fv1%2fmodels", "/health/live/%2e%2e/%2e%2e/v1/models",
    "/health/live/", "/health//live", "/Health/live", "/health/live;/v1/models", "/health/live%20",
    "/health/live%00", "/health", "/health/", "/health/../v1/models", "/.%2e/v1/models",
    "/\\v1/models", "/v1/models\\", "/%2e/v1/models", "/health/live%0a", "/health/live%3f",
    "http://127.0.0.1/v1/models", "http://evil.example/health/live/../v1/models", "/control",
    "/control/", "/control/register", "//control/register", "/CONTROL/register",
    "/control%2fregister", "/docs", "/redoc", "/openapi.json", "/metrics", "/v1/models%2f..%2f",
)  # fmt: skip


CLOSE = {"Connection": "close"}


@pytest.mark.parametrize("kind", ["controller", "worker"])
def test_paths_that_look_like_others_need_a_key_too(kind: str, registry: WorkerRegistry) -> None:
    def build() -> Edge:
        policy = AccessPolicy.build("127.0.0.1", api_keys=["key"], control_token=TOKEN)
        if kind == "controller":
            return create_controller_app(registry, control_token=TOKEN, policy=policy)
        return create_slot_app(ModelSlot(["fake"]), policy=policy, control_token=TOKEN)

    with serving(build) as server:
        for path in TRICKS:
            for method in ("GET", "POST", "HEAD", "OPTIONS"):
                request = http_request(method, path, headers=CLOSE)
                answer = read_all(send_raw(server.port, request))
                assert answer.startswith((b"HTTP/1.1 401 ", b"HTTP/1.1 400 ")), (method, path)
                if answer.startswith(b"HTTP/1.1 400 "):
                    # what no HTTP path can hold has not come as far as to be asked for a key
                    assert method != "HEAD" and json.loads(answer.partition(b"\r\n\r\n")[2])


def test_without_keys_they_do_not(registry: WorkerRegistry) -> None:
    with serving(house(registry)) as server:
        statuses = {
            read_all(send_raw(server.port, http_request("GET", path, headers=CLOSE)))[9:12]
            for path in TRICKS
            if "control" not in path.lower()
        }
    assert b"200" in statuses and b"401" not in statuses
