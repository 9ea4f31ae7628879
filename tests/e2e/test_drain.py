"""A server that is told to stop: readiness first, no new requests, streams to their end, no cuts.

Each part by itself, too: `serve`, a worker alone, a controller whose workers are elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.faults.client import LoadClient, Record, Request
from tests.faults.engine import Script
from tests.faults.history import Reply
from tests.faults.house import MODEL, House, Process, house

NUM_STREAMS = 16
WAIT_S = 30.0
STREAM_S = 2.0
STEP_S = 0.05
LONG = Script("s", say=int(STREAM_S / STEP_S), step_s=STEP_S)
ENDLESS = Script("e", say=100_000, step_s=STEP_S)
SHORT = Script("n", say=1)
Parts = Callable[..., tuple[Process, int]]


def chat(script: Script) -> Request:
    messages = [{"role": "user", "content": script.prompt}]
    return Request({"model": MODEL, "messages": messages, "stream": True})


@pytest.fixture
def home(tmp_path: Path) -> Iterator[House]:
    with house(tmp_path) as home:
        yield home


def serve(home: House, *flags: str) -> tuple[Process, int]:
    return home.serve(*flags), home.port


def worker(home: House, *flags: str) -> tuple[Process, int]:
    process = home.start("tests.faults.worker", *flags, MODEL)
    return process, process.wait_for_port()


def controller(home: House, *flags: str) -> tuple[Process, int]:
    home.start_controller(*flags)
    home.start_worker()
    home.wait_for_workers(1)
    return home.controller, home.port


class Drain:
    """`num_streams` streams of a server that is told to stop in the middle of them."""

    def __init__(self, process: Process, port: int) -> None:
        self.process = process
        self.port = port
        self.client = LoadClient(port)
        self.knocker = LoadClient(port)
        self.stopped_at = 0.0
        self.idle_at = 0.0

    async def run(
        self, script: Script, kinds: list[signal.Signals], *, num_streams: int = NUM_STREAMS
    ) -> list[Record]:
        """The streams' records; in the meantime others ask, again and again, until nobody is there.
        Each further signal is sent when the first has been heard."""
        async with asyncio.timeout(WAIT_S):
            tasks = [
                asyncio.create_task(self.client.send(chat(script))) for _ in range(num_streams)
            ]
            while not all(len(record.pieces) > 2 for record in self.client.records) or (
                len(self.client.records) < num_streams
            ):
                await asyncio.sleep(0.01)
            self.process.popen.send_signal(kinds[0])
            self.stopped_at = time.perf_counter()
            while (await self._readiness()) == 200:
                pass
            knocking = asyncio.create_task(self._knock())
            for kind in kinds[1:]:
                self.process.popen.send_signal(kind)
                self.stopped_at = time.perf_counter()
            records = [await task for task in tasks]
            self.idle_at = time.perf_counter()
            await knocking
            return records

    async def _readiness(self) -> int:
        async with httpx.AsyncClient() as client:
            return (await client.get(f"http://127.0.0.1:{self.port}/health/ready")).status_code

    async def _knock(self) -> None:
        while (await self.knocker.send(chat(SHORT))).end != "not connected":
            await asyncio.sleep(0.05)

    def refusals(self) -> list[Reply]:
        """Of those who asked before the last stream had ended; then the port may be closed."""
        return [Reply(each) for each in self.knocker.records if each.asked_at < self.idle_at - 0.1]

    def wait(self) -> int:
        code = self.process.popen.wait(WAIT_S)
        print(f"ended {time.perf_counter() - self.stopped_at:.2f} s after the last signal")
        return code


def ended_with(records: list[Record], code: str) -> bool:
    """Whether each of them ended with the error event of this code, and in one piece."""
    replies = [Reply(record) for record in records]
    errors = [reply.error for reply in replies]
    ends = {record.end for record in records}
    assert ends == {"closed"} and all(reply.is_whole for reply in replies), ends
    return all(error is not None and error["code"] == code for error in errors)


SOAK = pytest.mark.soak
TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    ("start", "kind", "exit_code"),
    [
        pytest.param(serve, TERM, 0, id="serve"),
        pytest.param(controller, TERM, 0, id="controller"),
        pytest.param(worker, TERM, 0, id="worker", marks=SOAK),
        pytest.param(serve, INT, 130, id="serve, Ctrl-C", marks=SOAK),
    ],
)
def test_streams_finish_and_new_requests_are_refused(
    home: House, start: Parts, kind: signal.Signals, exit_code: int
) -> None:
    drain = Drain(*start(home, "--drain-timeout-s=20"))
    children = psutil.Process(drain.process.pid).children(recursive=True)
    records = asyncio.run(drain.run(LONG, [kind]))
    assert drain.wait() == exit_code
    replies = [Reply(record) for record in records]
    assert [record.end for record in records] == ["closed"] * NUM_STREAMS
    for reply in replies:
        assert (reply.is_done, reply.texts) == (True, {0: LONG.text()}), reply.record.raw[-600:]
    refusals = drain.refusals()
    assert refusals
    for refusal in refusals:
        assert refusal.status == 503 and refusal.error is not None
        assert refusal.error["code"] == "server_shutting_down"
        # from what is left of the limit
        assert 10 <= int(refusal.headers["retry-after"]) <= 20
    assert not psutil.wait_procs(children, WAIT_S)[1]
    with contextlib.closing(socket.create_server(("127.0.0.1", drain.port))):
        pass


@pytest.mark.parametrize(
    ("start", "has_second"),
    [
        pytest.param(serve, True, id="serve"),
        pytest.param(controller, False, id="controller, limit"),
        pytest.param(serve, False, id="serve, limit", marks=SOAK),
        pytest.param(controller, True, id="controller", marks=SOAK),
        pytest.param(worker, True, id="worker", marks=SOAK),
        pytest.param(worker, False, id="worker, limit", marks=SOAK),
    ],
)
def test_what_does_not_finish_is_told(home: House, start: Parts, has_second: bool) -> None:
    """Without the patience that the test above has, its streams would be cut."""
    limit_s = 100 if has_second else 0.2
    drain = Drain(*start(home, f"--drain-timeout-s={limit_s}"))
    kinds = [signal.SIGTERM] * (1 + has_second)
    records = asyncio.run(drain.run(ENDLESS, kinds, num_streams=4))
    assert drain.wait() == 0
    code = "engine_stopped" if start is worker else "server_shutting_down"
    assert ended_with(records, code)


def test_a_worker_that_hangs_does_not_hold_up_who_insists(home: House) -> None:
    drain = Drain(*serve(home, "--drain-timeout-s=100"))
    [child] = psutil.Process(drain.process.pid).children()
    child.suspend()
    drain.process.popen.send_signal(signal.SIGTERM)
    while drain.process.popen.poll() is None and "stopping on SIGTERM" not in drain.process.log:
        time.sleep(0.01)
    drain.process.popen.send_signal(signal.SIGTERM)
    drain.stopped_at = time.perf_counter()
    assert drain.wait() == 0
    assert not psutil.wait_procs([child], WAIT_S)[1]
