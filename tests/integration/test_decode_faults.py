"""Faults in decode, with a real tiny model behind a real server: who has the fault fails, alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from chatserve.config import WorkerConfig
from chatserve.engine.async_engine import AsyncEngine
from chatserve.engine.runner import Runner
from chatserve.engine.serving import load
from chatserve.server.edge import Edge
from chatserve.server.worker import create_worker_app
from tests import faulty_worker, tiny
from tests.faults.house import house
from tests.servers import RunningServer, serving

WAIT_S = 60.0
NUM_REQUESTS = 8
ILL = 3
NUM_TOKENS = 16
LETTERS = "ABCDEFGH"
FEW = range(4)
MANY = range(100)


def body(number: int, **changes: Any) -> dict[str, Any]:
    """Of a request whose answer is known whatever the weights say: its own letter all along."""
    token_id = ord(LETTERS[number]) - ord("!")
    return {
        "model": "tiny", "messages": [{"role": "user", "content": f"request {number}"}],
        "temperature": 0, "max_tokens": NUM_TOKENS, "logit_bias": {str(token_id): 100}, **changes,
    }  # fmt: skip


class Ward:
    def __init__(self, stack: ExitStack, folder: Path) -> None:
        config = WorkerConfig(
            weights=str(folder), device="cpu", dtype="float32", model_names=("tiny",),
            max_num_seqs=NUM_REQUESTS, speculation=False,
        )  # fmt: skip
        engine, model = load(config)
        self.engine: AsyncEngine = engine
        self.num_free = engine.stats().free_kv_tokens

        def build() -> Edge:
            engine.start()
            return create_worker_app(engine, model)

        self.server: RunningServer = stack.enter_context(serving(build))
        stack.callback(lambda: self.server.call(engine.stop()))
        self.client = stack.enter_context(httpx.Client(timeout=WAIT_S))
        self.pool = stack.enter_context(ThreadPoolExecutor(NUM_REQUESTS))

    def ask(self, request: dict[str, Any]) -> httpx.Response:
        return self.client.post(f"{self.server.url}/v1/chat/completions", json=request)

    def round(self, max_tokens_of_ill: int) -> list[httpx.Response]:
        requests = [body(number) for number in range(NUM_REQUESTS)]
        requests[ILL]["max_tokens"] = max_tokens_of_ill
        return list(self.pool.map(self.ask, requests))


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(Runner, "run", faulty_worker.with_faults(Runner.run))
        yield Ward(stack, folder)


@pytest.mark.parametrize(
    "rounds", [FEW, pytest.param(MANY, marks=pytest.mark.soak)], ids=["few", "many"]
)
@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (faulty_worker.RAISES, 500, "generation_failed"),
        (faulty_worker.NAN, 500, "generation_failed"),
        (faulty_worker.NO_MEMORY, 503, "out_of_memory"),
    ],
    ids=["raises", "NaN", "no memory"],
)
def test_one_of_eight_fails_and_the_others_are_what_they_are_without_it(
    ward: Ward, fault: int, status: int, code: str, rounds: range
) -> None:
    for _ in rounds:
        replies = ward.round(fault)
        error = replies[ILL].json()["error"]
        assert (replies[ILL].status_code, error["code"]) == (status, code)
        assert error["type"] == "server_error"
        for number, reply in enumerate(replies):
            if number != ILL:
                [choice] = reply.json()["choices"]
                assert choice["message"]["content"] == LETTERS[number] * NUM_TOKENS
                assert choice["finish_reason"] == "length"
        wait_for(lambda: ward.engine.stats().free_kv_tokens == ward.num_free)
        assert ward.engine.stats().is_alive
    print(f"{len(rounds)} rounds: {len(rounds)} failed, {7 * len(rounds)} unchanged")


def test_a_request_that_always_fails_costs_nobody_the_engine(ward: Ward) -> None:
    for _ in range(5):
        assert ward.ask(body(0, max_tokens=faulty_worker.RAISES)).status_code == 500
    assert ward.ask(body(1)).status_code == 200


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.soak
def test_a_worker_that_fails_at_everything_is_replaced(tmp_path: Path) -> None:
    """`serve`, whose first worker's device is lost for good in the middle of an answer."""
    folder = tmp_path / "tiny"
    tiny.save_model(folder)
    with house(tmp_path) as home:
        server = home.start(
            "tests.faulty_worker", "serve", "--port=0", "--device=cpu", "--dtype=float32",
            str(folder), OMP_NUM_THREADS="1", BREAKS_ONCE=str(tmp_path / "broken"),
        )  # fmt: skip
        url = f"http://127.0.0.1:{server.wait_for_port()}"
        [before] = server.children()
        requests = [body(number, max_tokens=400) for number in range(NUM_REQUESTS)]
        requests[ILL]["max_tokens"] = faulty_worker.BREAKS

        def ask(request: dict[str, Any]) -> httpx.Response:
            return httpx.post(f"{url}/v1/chat/completions", json=request, timeout=WAIT_S)

        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            replies = list(pool.map(ask, requests))
        # all that were under way go on at the successor, which is sound
        for number, reply in enumerate(replies):
            assert reply.status_code == 200, server.log
            text = reply.json()["choices"][0]["message"]["content"]
            assert text == LETTERS[number] * requests[number]["max_tokens"]
        assert (tmp_path / "broken").exists()
        [after] = server.children()
        assert after != before
