"""A worker and a controller around an engine that makes no step unless the test lets it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.config import WorkerConfig
from chatserve.engine.runner import Runner
from chatserve.engine.scheduler import Scheduled
from chatserve.engine.serving import load
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_worker_app
from tests.servers import RunningServer, http_request, send_raw, serving

WAIT_S = 20.0
MAX_CONNECTIONS = 1000  # what is tested here is behind them
CHUNK = 32  # tokens in a step; a prompt has 64
# every token is the byte "A", up to the limit of the context
ALWAYS_A = {str(ord("A") - ord("!")): 100}
TOKEN_OF_STREAM = b'"content":"A"'
CARD = ModelCard(name="tiny", created=1)


class Turnstile:
    """Lets the engine's steps through one by one; open until `close`."""

    def __init__(self) -> None:
        self._num_admitted: float = float("inf")
        self._batches: list[int] = []
        self._changed = threading.Condition()

    def pass_through(self, num_sequences: int) -> None:
        """Called by the engine at the start of a step."""
        with self._changed:
            self._batches.append(num_sequences)
            self._changed.notify_all()
            # no time limit: a step that fails frees its sequence, as if it had been aborted
            self._changed.wait_for(lambda: len(self._batches) <= self._num_admitted)

    def close(self) -> None:
        with self._changed:
            self._batches.clear()
            self._num_admitted = 0

    def open(self) -> None:
        self.admit(float("inf"))

    def admit(self, num_steps: float) -> None:
        with self._changed:
            self._num_admitted += num_steps
            self._changed.notify_all()

    @property
    def batches(self) -> list[int]:
        """Of each step that has begun, how many sequences are in it."""
        with self._changed:
            return list(self._batches)

    @property
    def is_stopped_here(self) -> bool:
        """Whether a step has come and is not let through."""
        with self._changed:
            return len(self._batches) > self._num_admitted

    def run_until_next(self, num_steps: int) -> None:
        """Let `num_steps` through and return when one more is waiting."""
        self.admit(num_steps)
        with self._changed:
            assert self._changed.wait_for(
                lambda: len(self._batches) > self._num_admitted, WAIT_S
            ), "the engine makes no further step"


class House:
    """A worker whose engine stands behind a turnstile, and a controller in front of it.

    `limits`: of the worker. With `keys` clients need one of them; then the worker obeys the
    controller only, if `is_behind`, or has the keys itself.
    """

    def __init__(
        self,
        stack: ExitStack,
        folder: Path,
        *,
        keys: Sequence[str] = (),
        is_behind: bool = False,
        write_timeout_s: float = 30.0,
        **limits: Any,
    ) -> None:
        self.turnstile = Turnstile()
        # there is no heartbeat: a worker that nothing is heard of does not count as stalled
        self.registry = WorkerRegistry(time.monotonic, expiry_s=1000, stall_s=0)
        self.is_behind = is_behind
        inner, outer = (
            AccessPolicy.build("127.0.0.1", api_keys=each, control_token="token")
            for each in (("token",) if is_behind else keys, keys)
        )
        self._num_requests = 0
        run: Callable[..., torch.Tensor] = Runner.run

        def run_when_admitted(
            runner: object, batch: Sequence[Scheduled], *rest: object
        ) -> torch.Tensor:
            self.turnstile.pass_through(len(batch))
            return run(runner, batch, *rest)

        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(Runner, "run", run_when_admitted)
        config = WorkerConfig(
            weights=str(folder), device="cpu", dtype="float32", model_names=("tiny",),
            max_num_batched_tokens=CHUNK, speculation=False, **{"max_num_seqs": 3, **limits},
        )  # fmt: skip
        self.engine, model = load(config)

        def build_worker() -> Edge:
            self.engine.start()
            token = "token" if is_behind else None
            return create_worker_app(self.engine, model, policy=inner, control_token=token)

        self.worker: RunningServer = stack.enter_context(
            serving(
                build_worker,
                max_connections=MAX_CONNECTIONS,
                write_timeout_s=0 if is_behind else write_timeout_s,
            )
        )
        stack.callback(lambda: self.worker.call(self.engine.stop()))
        stack.callback(self.turnstile.open)
        self.controller: RunningServer = stack.enter_context(
            serving(
                lambda: create_controller_app(self.registry, control_token="token", policy=outer),
                max_connections=MAX_CONNECTIONS,
                write_timeout_s=write_timeout_s,
            )
        )
        self.idle = self.engine.stats()

    @property
    def front(self) -> RunningServer:
        """Whom clients talk to."""
        return self.controller if self.is_behind else self.worker

    def close_turnstile(self) -> None:
        self.turnstile.close()
        self.idle = self.engine.stats()
        num_places = self.engine.admission.hard_limit
        status = WorkerStatus(state="ready", models=[CARD], num_places=num_places)
        self.registry.register("w", self.worker.url, status)

    def body(self) -> dict[str, Any]:
        """Of a request that is answered with "A" as long as there is room."""
        self._num_requests += 1
        # no two prompts are alike: none is spared its prefill
        message = {"role": "user", "content": f"{self._num_requests:045}"}
        return {
            "model": "tiny", "messages": [message], "logit_bias": ALWAYS_A, "temperature": 0,
        }  # fmt: skip

    def open(self, door: str, **options: Any) -> closing[socket.socket]:
        server: RunningServer = getattr(self, door)
        body = {**self.body(), **options}
        return closing(send_raw(server.port, http_request("POST", "/v1/chat/completions", body)))

    def wait_until_servers_are_done(self, num_left: int = 0) -> None:
        """No route runs any more for who has left; `num_left` requests go on."""
        for server in (self.controller, self.worker):
            wait_for(partial(self._has_at_most, server, num_left), "a server does not let go")
        leases = [worker.num_in_flight for worker in self.registry._workers.values()]
        assert sum(leases) <= num_left

    @staticmethod
    def _has_at_most(server: RunningServer, num_requests: int) -> bool:
        return server.edge.num_in_flight <= num_requests

    def is_free(self) -> bool:
        # the figures are read one by one while the engine goes on
        stats = self.engine.stats()
        return (stats.num_running, stats.num_waiting, stats.free_kv_tokens) == (
            0, 0, self.idle.free_kv_tokens,
        )  # fmt: skip

    def num_steps(self) -> int:
        return self.engine.stats().tick - self.idle.tick


def wait_for(condition: Callable[[], bool], what: str = "") -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what or "timed out"
        time.sleep(0.001)


def read_tokens(sock: socket.socket, num_tokens: int) -> None:
    data = b""
    while data.count(TOKEN_OF_STREAM) < num_tokens:
        chunk = sock.recv(65536)
        assert chunk, data
        data += chunk
