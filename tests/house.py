"""A controller with workers that are no processes: fake engines, and scripts."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import httpx

from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy
from chatserve.server.moves import ResumePolicy
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_worker_app
from tests.fakes import FakeEngine, FakeModel
from tests.servers import RunningServer, Script, ScriptedWorker, http_request, send_raw, serving

TOKEN = "control-token"
CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
STREAM = CHAT | {"stream": True}
READY = WorkerStatus(state="ready", models=[ModelCard(name="fake", created=1)])
WAIT_S = 20.0


class House:
    """One controller, its registry, and workers."""

    def __init__(
        self, stack: ExitStack, resume: ResumePolicy, registry: WorkerRegistry | None = None
    ) -> None:
        self._stack = stack
        self.registry = registry or WorkerRegistry(time.monotonic)
        self.controller: RunningServer = stack.enter_context(
            serving(
                lambda: create_controller_app(self.registry, control_token=TOKEN, resume=resume)
            )
        )
        self.url = self.controller.url

    def add(self, worker_id: str, engine: FakeEngine) -> RunningServer:
        policy = AccessPolicy.build("127.0.0.1", api_keys=[TOKEN])
        worker: RunningServer = self._stack.enter_context(
            serving(lambda: create_worker_app(engine, FakeModel(), policy=policy))
        )
        self.list(worker_id, worker.url)
        return worker

    def add_scripted(
        self, worker_id: str, *scripts: Script, status: WorkerStatus = READY
    ) -> ScriptedWorker:
        worker = self._stack.enter_context(ScriptedWorker(*scripts))
        self.list(worker_id, worker.url, status)
        return worker

    def list(self, worker_id: str, url: str, status: WorkerStatus = READY) -> None:
        self.do(lambda: self.registry.register(worker_id, url, status))

    def do(self, work: Callable[[], object]) -> None:
        """Something with the registry, on the controller's loop."""

        async def on_the_loop() -> None:
            work()

        self.controller.call(on_the_loop())

    def num_in_flight(self) -> int:
        return sum(worker.num_in_flight for worker in self.registry._workers.values())

    def wait_until_idle(self) -> None:
        """Nothing is under way, and no worker is claimed."""
        self.controller.wait_until_idle()
        self.wait_for(lambda: self.num_in_flight() == 0, "a worker is still claimed")

    def wait_for(self, condition: Callable[[], bool], what: str = "timed out") -> None:
        """Until the controller's thread has made it true."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.002)

    def post(self, body: Any = STREAM) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=WAIT_S)

    def open(self, body: Any = STREAM, path: str = "/v1/chat/completions") -> socket.socket:
        return send_raw(self.controller.port, http_request("POST", path, body))
