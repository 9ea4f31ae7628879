"""Whoever leaves costs the engine at most the step that was running: counted, not timed.

The engine stands at a turnstile: no step runs unless the test lets it. A server that noticed the
client's absence only when it had a token to send would never notice it here.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.config import WorkerConfig
from chatserve.engine.prompt import PromptBuilder
from chatserve.engine.runner import Runner
from chatserve.engine.scheduler import Scheduled
from chatserve.engine.serving import load
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import Edge
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_worker_app
from tests import tiny
from tests.servers import RunningServer, http_request, reset, send_raw, serving

WAIT_S = 20.0
CHUNK = 32  # tokens in a step; a prompt has 64
# every token is the byte "A", up to the limit of the context
ALWAYS_A = {str(ord("A") - ord("!")): 100}
TOKEN_OF_STREAM = b'"content":"A"'
READY = WorkerStatus(state="ready", models=[ModelCard(name="tiny", created=1)])
DOORS = ["worker", "controller"]


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

    def run_until_next(self, num_steps: int) -> None:
        """Let `num_steps` through and return when one more is waiting."""
        self.admit(num_steps)
        with self._changed:
            assert self._changed.wait_for(
                lambda: len(self._batches) > self._num_admitted, WAIT_S
            ), "the engine makes no further step"


class House:
    """A worker whose engine stands behind a turnstile, and a controller in front of it."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.turnstile = Turnstile()
        self.registry = WorkerRegistry(time.monotonic)
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
            max_num_seqs=3, max_num_batched_tokens=CHUNK, speculation=False,
        )  # fmt: skip
        self.engine, model = load(config)

        def build_worker() -> Edge:
            self.engine.start()
            return create_worker_app(self.engine, model)

        self.worker: RunningServer = stack.enter_context(serving(build_worker))
        stack.callback(lambda: self.worker.call(self.engine.stop()))
        stack.callback(self.turnstile.open)
        self.controller: RunningServer = stack.enter_context(
            serving(lambda: create_controller_app(self.registry, control_token="token"))
        )
        self.idle = self.engine.stats()

    def close_turnstile(self) -> None:
        self.turnstile.close()
        self.idle = self.engine.stats()
        # no heartbeat keeps the worker listed for longer than one test
        self.registry.register("w", self.worker.url, READY)

    def open(self, door: str, **options: Any) -> closing[socket.socket]:
        server: RunningServer = getattr(self, door)
        self._num_requests += 1
        # no two prompts are alike: none is spared its prefill
        message = {"role": "user", "content": f"{self._num_requests:045}"}
        body = {
            "model": "tiny", "messages": [message], "logit_bias": ALWAYS_A, "temperature": 0,
            **options,
        }  # fmt: skip
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


@pytest.fixture(scope="module")
def open_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder)
    with ExitStack() as stack:
        yield House(stack, folder)


@pytest.fixture
def house(open_house: House) -> Iterator[House]:
    open_house.close_turnstile()
    yield open_house
    # what a failed test has left behind runs to its limit
    open_house.turnstile.open()
    wait_for(open_house.is_free)
    open_house.wait_until_servers_are_done()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_steps", [1, 9], ids=["prefill", "decode"])
def test_no_step_begins_after_the_one_in_which_the_client_left(
    house: House, door: str, stream: bool, n: int, num_steps: int
) -> None:
    with house.open(door, stream=stream, n=n) as sock:
        house.turnstile.run_until_next(num_steps)
        if stream and num_steps > 1:
            read_tokens(sock, 3)
        reset(sock)
        house.wait_until_servers_are_done()
    assert house.num_steps() == num_steps and not house.is_free()
    house.turnstile.admit(1)
    wait_for(house.is_free, "the step that was running was not the last")
    assert house.num_steps() == num_steps + 1 == len(house.turnstile.batches)
    assert house.registry._workers["w"].num_ejections == 0


@pytest.mark.parametrize("door", DOORS)
def test_who_stays_goes_on_and_who_waits_is_forgotten(house: House, door: str) -> None:
    with house.open(door, stream=True, n=2) as stays:
        house.turnstile.run_until_next(9)
        with ExitStack() as stack:
            # the first of these is admitted in the next step, the other finds all places taken
            leaves = stack.enter_context(house.open(door, stream=True))
            wait_for(lambda: house.engine.stats().num_waiting == 1)
            waits = stack.enter_context(house.open(door, stream=False))
            wait_for(lambda: house.engine.stats().num_waiting == 2)
            house.turnstile.run_until_next(3)
            assert house.turnstile.batches[-1] == 3
            reset(waits)
            house.wait_until_servers_are_done(num_left=2)
            reset(leaves)
            house.wait_until_servers_are_done(num_left=1)
        house.turnstile.run_until_next(1)
        assert house.turnstile.batches[-1] == 2
        assert house.engine.stats().num_waiting == 0
        house.turnstile.run_until_next(4)
        assert house.turnstile.batches[-5:] == [2] * 5
        read_tokens(stays, 2 * 10)
        reset(stays)
        house.wait_until_servers_are_done()
    house.turnstile.admit(1)
    wait_for(house.is_free)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_leaving_while_the_prompt_is_prepared_costs_one_step_at_most(
    house: House, monkeypatch: pytest.MonkeyPatch, door: str, stream: bool
) -> None:
    is_prepared, has_left = threading.Event(), threading.Event()
    chat = PromptBuilder.chat

    def slow_chat(self: PromptBuilder, *arguments: Any, **options: Any) -> list[int]:
        is_prepared.set()
        assert has_left.wait(WAIT_S)
        return chat(self, *arguments, **options)

    monkeypatch.setattr(PromptBuilder, "chat", slow_chat)
    with house.open(door, stream=stream) as sock:
        assert is_prepared.wait(WAIT_S)
        reset(sock)
        if door == "controller":
            wait_for(lambda: house.controller.edge.num_in_flight == 0)
    has_left.set()
    house.wait_until_servers_are_done()
    # its first step may have begun before the server knew; whoever comes next is alone
    with house.open(door, stream=stream) as sock:
        house.turnstile.run_until_next(9)
        assert set(house.turnstile.batches) == {1}
        reset(sock)
        house.wait_until_servers_are_done()
    house.turnstile.admit(1)
    wait_for(house.is_free)
