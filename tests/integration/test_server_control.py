"""The control plane: registration with proof, heartbeats, refusals, the way back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest

from chatserve.errors import RegistrationFailed
from chatserve.protocol.control import NONCE_HEADER, bearer, proof_of
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy
from chatserve.server.heartbeat import HeartbeatSender
from chatserve.server.model_slot import ModelSlot
from chatserve.server.page import built
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_slot_app
from tests.fakes import FakeEngine, FakeModel
from tests.servers import RunningServer, ScriptedWorker, serving

TOKEN = "control-token"
STATUS = {"state": "ready", "models": [{"name": "fake", "created": 1}]}
WAIT_S = 20.0


def controller_app(registry: WorkerRegistry, **options: Any) -> Callable[[], Any]:
    return lambda: create_controller_app(registry, control_token=TOKEN, **options)


@pytest.fixture
def registry() -> WorkerRegistry:
    return WorkerRegistry(time.monotonic, expected=["fake"])


@pytest.fixture
def controller(registry: WorkerRegistry) -> Iterator[RunningServer]:
    with serving(controller_app(registry, heartbeat_interval_s=0.01)) as server:
        yield server


def worker_app(slot: ModelSlot, token: str = TOKEN) -> Callable[[], Any]:
    policy = AccessPolicy.build("127.0.0.1", api_keys=[token])
    return lambda: create_slot_app(slot, policy=policy, control_token=token)


def register(controller: RunningServer, listens_on: int, **changes: Any) -> httpx.Response:
    return httpx.post(
        f"{controller.url}/control/register",
        json={"worker_id": "w", "port": listens_on, "status": STATUS, **changes},
        headers=dict(bearer(TOKEN)),
    )


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


class Sender:
    """A heartbeat sender running on its worker's loop."""

    def __init__(self, url: str, worker: RunningServer, slot: ModelSlot, token: str = TOKEN):
        self.sender = HeartbeatSender(
            url, token, worker_id="w", port=worker.port, status=slot.status, jitter=lambda: 0.0
        )
        self._loop = worker.loop
        self.future = asyncio.run_coroutine_threadsafe(self.sender.run(), worker.loop)

    def stop(self) -> None:
        self.future.cancel()
        with suppress(BaseException):
            self.future.result(WAIT_S)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def wait_for(registry: WorkerRegistry, condition: Callable[[], bool]) -> None:
    """Wait until the registry has come to say so."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, registry.readiness()
        time.sleep(0.002)


def states(registry: WorkerRegistry) -> list[str]:
    return [model.state for model in registry.readiness()]


def test_life_of_a_worker(
    controller: RunningServer, registry: WorkerRegistry, stack: ExitStack
) -> None:
    slot = ModelSlot(["fake"])
    worker = stack.enter_context(serving(worker_app(slot)))
    slot.progress(10, 40)
    sender = Sender(controller.url, worker, slot)
    stack.callback(sender.stop)
    wait_for(registry, lambda: states(registry) == ["loading"])
    ready = httpx.get(f"{controller.url}/health/ready")
    assert ready.status_code == 503
    assert ready.json() == {
        "status": "loading",
        "models": [{"name": "fake", "state": "loading", "loaded_bytes": 10, "total_bytes": 40}],
    }
    slot.fill(FakeEngine(), FakeModel())
    worker.loop.call_soon_threadsafe(sender.sender.announce)
    wait_for(registry, registry.is_ready)
    assert httpx.get(f"{controller.url}/health/ready").status_code == 200
    assert registry._workers["w"].base_url == worker.url
    response = httpx.post(f"{controller.url}/v1/completions", json={"model": "fake", "prompt": "x"})
    assert response.status_code == 200

    # forgotten: the next heartbeat brings it back
    forgotten = registry._workers["w"]
    worker.loop.call_soon_threadsafe(registry.remove, "w")
    wait_for(registry, lambda: registry._workers.get("w") not in (None, forgotten))
    wait_for(registry, registry.is_ready)

    sender.stop()
    wait_for(registry, lambda: not registry._workers)


def test_worker_waits_for_a_controller_that_is_not_there_yet(
    registry: WorkerRegistry, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatserve.server import heartbeat

    monkeypatch.setattr(heartbeat, "FIRST_RETRY_S", 0.01)
    slot = ModelSlot.filled(FakeEngine(), FakeModel())
    worker = stack.enter_context(serving(worker_app(slot)))
    with ScriptedWorker([], [b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"]) as nobody:
        sender = Sender(nobody.url, worker, slot)
        wait_for(registry, lambda: len(nobody.requests) == 2)
        assert not sender.future.done()
        sender.stop()


def test_worker_with_the_wrong_token_ends(
    controller: RunningServer, registry: WorkerRegistry, stack: ExitStack
) -> None:
    slot = ModelSlot(["fake"])
    worker = stack.enter_context(serving(worker_app(slot, "other")))
    sender = Sender(controller.url, worker, slot, "other")
    with pytest.raises(RegistrationFailed, match="401"):
        sender.future.result(WAIT_S)
    assert not registry._workers


def test_controller_that_cannot_call_back_says_so(
    controller: RunningServer, registry: WorkerRegistry, stack: ExitStack
) -> None:
    slot = ModelSlot(["fake"])
    worker = stack.enter_context(serving(worker_app(slot)))
    worker.port = 1
    sender = Sender(controller.url, worker, slot)
    with pytest.raises(RegistrationFailed, match=r"cannot reach the worker at http://127.0.0.1:1"):
        sender.future.result(WAIT_S)
    assert not registry._workers


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN + "x", TOKEN[:-1]])
@pytest.mark.parametrize("path", ["register", "heartbeat", "leave"])
def test_without_the_token_nothing_goes_out(
    controller: RunningServer, registry: WorkerRegistry, token: str | None, path: str
) -> None:
    with ScriptedWorker([b""]) as target:
        response = httpx.post(
            f"{controller.url}/control/{path}",
            json={"worker_id": "w", "port": target.port, "status": STATUS},
            headers=dict(bearer(token)) if token else {},
        )
        assert code_of(response) == (401, "invalid_api_key")
    assert target.requests == [] and not registry._workers


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "169.254.169.254"},
        {"url": "http://169.254.169.254/"},
        {"address": "file:///etc/passwd"},
        {"port": "80@evil.example"},
        {"port": 0},
        {"port": 70000},
        {"worker_id": "../x"},
        {"status": {**STATUS, "models": [{"name": "a\r\nb", "created": 1}]}},
    ],
)
def test_hostile_registrations(
    controller: RunningServer, registry: WorkerRegistry, changes: dict[str, Any]
) -> None:
    with ScriptedWorker([b""]) as target:
        response = register(controller, target.port, **changes)
        assert response.status_code == 400
    assert target.requests == [] and not registry._workers


PROOF_OF_ANOTHER = b'{"status":"live","proof":"%s"}' % proof_of("other", "n").encode()


@pytest.mark.parametrize(
    "body", [b"", b"hello", b"[]", b'{"status":"live"}', b'{"proof":5}', PROOF_OF_ANOTHER]
)
def test_port_that_does_not_know_the_token(
    controller: RunningServer, registry: WorkerRegistry, body: bytes
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with ScriptedWorker([head % len(body) + body]) as target:
        response = register(controller, target.port)
        assert code_of(response) == (403, "registration_refused")
        assert f"http://127.0.0.1:{target.port}" in response.json()["error"]["message"]
        assert target.requests[0].startswith(b"GET /health/live ")
        # the call-back shows a nonce, never the token
        assert TOKEN.encode() not in target.requests[0]
        assert NONCE_HEADER.lower().encode() in target.requests[0].lower()
    assert not registry._workers


def test_call_back_follows_no_redirect(controller: RunningServer, registry: WorkerRegistry) -> None:
    with ScriptedWorker([]) as elsewhere:
        head = f"HTTP/1.1 302 Away\r\nLocation: {elsewhere.url}\r\nContent-Length: 0\r\n\r\n"
        with ScriptedWorker([head.encode()]) as target:
            assert register(controller, target.port).status_code == 403
        assert elsewhere.requests == []


def test_call_back_does_not_wait_for_ever(
    controller: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatserve.server import controller as module

    monkeypatch.setattr(module, "CALL_BACK_TIMEOUT_S", 0.1)
    with ScriptedWorker([None]) as target:
        assert code_of(register(controller, target.port)) == (403, "registration_refused")
        assert target.closed_by_peer.wait(WAIT_S)


def test_id_of_a_live_worker_cannot_be_taken_over(
    controller: RunningServer, registry: WorkerRegistry, stack: ExitStack
) -> None:
    first, second = (
        stack.enter_context(serving(worker_app(ModelSlot.filled(FakeEngine(), FakeModel()))))
        for _ in range(2)
    )
    assert register(controller, first.port).status_code == 200
    assert code_of(register(controller, second.port)) == (403, "registration_refused")
    assert registry._workers["w"].base_url == first.url


def test_ejected_worker_comes_back_when_it_proves_to_be_well(
    controller: RunningServer, registry: WorkerRegistry, stack: ExitStack
) -> None:
    slot = ModelSlot.filled(FakeEngine(), FakeModel())
    worker = stack.enter_context(serving(worker_app(slot)))
    stack.callback(Sender(controller.url, worker, slot).stop)
    wait_for(registry, registry.is_ready)
    worker.loop.call_soon_threadsafe(registry.eject, "w")
    wait_for(registry, lambda: not registry.is_ready())
    wait_for(registry, registry.is_ready)
    assert registry._workers["w"].num_ejections == 1


def test_heartbeat_of_a_worker_that_is_still_gone_does_not_bring_it_back(
    controller: RunningServer, registry: WorkerRegistry, stack: ExitStack
) -> None:
    with serving(worker_app(ModelSlot.filled(FakeEngine(), FakeModel()))) as worker:
        assert register(controller, worker.port).status_code == 200
    registry.eject("w")
    registry._workers["w"].ejected_until = 0.0
    reply = httpx.post(
        f"{controller.url}/control/heartbeat",
        json={"worker_id": "w", "status": STATUS},
        headers=dict(bearer(TOKEN)),
    )
    assert reply.json() == {"is_known": True}
    assert registry._workers["w"].num_ejections == 2
    assert states(registry) == ["unreachable"]


def test_unknown_heartbeat(controller: RunningServer) -> None:
    reply = httpx.post(
        f"{controller.url}/control/heartbeat",
        json={"worker_id": "x", "status": STATUS},
        headers=dict(bearer(TOKEN)),
    )
    assert reply.json() == {"is_known": False}


def test_stalled_worker_shows_in_decode_health(
    controller: RunningServer, registry: WorkerRegistry, stack: ExitStack
) -> None:
    worker = stack.enter_context(serving(worker_app(ModelSlot.filled(FakeEngine(), FakeModel()))))
    busy = {**STATUS, "num_running": 1, "tick": 5}
    assert register(controller, worker.port, status=busy).status_code == 200
    assert httpx.get(f"{controller.url}/health/decode").status_code == 200
    registry._workers["w"].moved_at -= 31
    response = httpx.get(f"{controller.url}/health/decode")
    assert (response.status_code, response.json()["stalled"]) == (503, ["w"])


def test_keys_guard_the_api_and_not_the_control_plane(registry: WorkerRegistry) -> None:
    policy = AccessPolicy.build("127.0.0.1", api_keys=["key"], control_token=TOKEN)
    with serving(controller_app(registry, policy=policy)) as controller:
        url = f"{controller.url}/v1/models"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers=dict(bearer(TOKEN))).status_code == 401
        assert httpx.get(url, headers=dict(bearer("key"))).status_code == 200
        assert httpx.get(f"{controller.url}/health/ready").status_code == 503
        heartbeat = f"{controller.url}/control/heartbeat"
        body = {"worker_id": "x", "status": STATUS}
        assert httpx.post(heartbeat, json=body, headers=dict(bearer("key"))).status_code == 401
        assert httpx.post(heartbeat, json=body, headers=dict(bearer(TOKEN))).status_code == 200


def test_every_route_but_health_and_the_page_s_files_needs_a_key(registry: WorkerRegistry) -> None:
    policy = AccessPolicy.build("127.0.0.1", api_keys=["key"], control_token=TOKEN)
    for build in (controller_app(registry, policy=policy), worker_app(ModelSlot(["fake"]))):
        with serving(build) as server, httpx.Client(base_url=server.url) as client:
            paths = [route.path for route in server.edge.app.routes]  # type: ignore[attr-defined]  # FastAPI
            assert len(paths) >= 7
            for path in paths:
                for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
                    answer = client.request(method, path.replace("{name:path}", "x"), json={})
                    is_page = path in built() and method in ("GET", "HEAD")
                    is_open = path.startswith("/health/") or is_page
                    expected = {200, 503, 405} if is_open else {401}
                    assert answer.status_code in expected, (method, path)
