"""Processes are killed and stopped under streams: nobody is cut in silence, and who may go on does.

Rows 1, 3, 4 and 8 of the reliability goals, with workers without weights; `test_resumed_text.py`
has them with a model.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.faults.client import LoadClient, Record, Request
from tests.faults.engine import Script
from tests.faults.history import Reply
from tests.faults.house import MODEL, House, Process, house
from tests.faults.invariants import check
from tests.faults.window import look_until

WAIT_S = 30.0
QUICK = ("--heartbeat-interval-s=0.2", "--stall-timeout-s=2")


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[House]:
    with house(tmp_path) as standing:
        yield standing


def asked(number: int, say: int, *, is_stream: bool = True) -> Request:
    script = Script(f"r{number}", say)
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": script.prompt}],
        "stream": is_stream,
    }
    if is_stream:
        body["stream_options"] = {"include_usage": True}
    return Request(body, text=script.text(), num_tokens=say)


def num_tokens(record: Record) -> int:
    return max(0, record.raw.count(b"data: ") - 1)


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.005)


async def harmed(
    port: int, requests: Sequence[Request], harm: Callable[[], object], *, at_token: int = 20
) -> list[Record]:
    """All of them at once, and `harm` when each stream has got so many tokens."""
    client = LoadClient(port, timeout_s=WAIT_S)
    running = asyncio.gather(*map(client.send, requests))
    await until(
        lambda: (
            len(client.records) == len(requests)
            and all(num_tokens(record) >= at_token for record in client.records)
        ),
        "not all streams have begun",
    )
    harm()
    return await running


def ends(records: Sequence[Record]) -> Counter[str]:
    """How many of them are whole, and which errors the others end with."""
    found = []
    for record in records:
        reply = Reply(record)
        error = reply.error
        whole = "whole" if reply.is_done or reply.status == 200 else "cut"
        found.append(str(error["code"]) if error else whole)
    return Counter(found)


def is_calm(standing: House, process: Process) -> None:
    look_until(standing.folder, process.pid, lambda view: view.is_calm, "not calm", WAIT_S)


def kill(process_id: int) -> Callable[[], object]:
    return lambda: os.kill(process_id, signal.SIGKILL)


@pytest.mark.parametrize(
    ("flag", "expected"), [("--resume", {"whole": 16}), ("--no-resume", {"worker_died": 16})]
)
def test_the_only_worker_is_killed_under_streams(
    faulty: House, flag: str, expected: dict[str, int]
) -> None:
    """Row 1. The other worth of the flag is the paired run: what is seen is the guard's doing."""
    server = faulty.serve(flag)
    (worker,) = server.children()
    records = asyncio.run(harmed(faulty.port, [asked(i, 60) for i in range(16)], kill(worker)))
    assert ends(records) == expected and check(records) == []
    faulty.wait_for_workers(1)
    later = asyncio.run(
        LoadClient(faulty.port).send_all((asked(i, 3) for i in range(20)), at_once=4)
    )
    assert ends(later) == {"whole": 20} and check(later) == []
    is_calm(faulty, server)


@pytest.mark.parametrize("resumes", [True, False])
def test_one_of_two_workers_is_killed_under_many_requests(faulty: House, resumes: bool) -> None:
    """Row 4: who was at the dead one may be told so, nobody else, and with resumption nobody."""
    controller = faulty.start_controller("--resume" if resumes else "--no-resume")
    doomed, _ = faulty.start_worker(), faulty.start_worker()
    faulty.wait_for_workers(2)
    requests = [asked(i, 8, is_stream=i % 2 == 0) for i in range(200)]
    # its streams, to be there when it dies
    long = [asked(1000 + i, 40) for i in range(8)]

    killed_at: list[float] = []

    def harm() -> None:
        killed_at.append(time.perf_counter())
        doomed.popen.kill()

    async def run() -> tuple[list[Record], list[Record]]:
        others = asyncio.create_task(
            LoadClient(faulty.port, timeout_s=WAIT_S).send_all(requests, at_once=8)
        )
        victims = await harmed(faulty.port, long, harm)
        return victims, await others

    victims, others = asyncio.run(run())
    assert check([*victims, *others]) == []
    found = ends([*victims, *others])
    later = [each for each in others if each.asked_at > killed_at[0] + 1.0]
    print(f"{found}; of the {len(later)} asked over 1 s after the kill: {ends(later)}")
    assert set(ends(later)) <= {"whole"}
    assert set(found) <= {"whole", "worker_died"}
    # under way there were the 8 at a time, and the 8 long ones
    assert found["worker_died"] == 0 if resumes else 1 <= found["worker_died"] <= 16
    is_calm(faulty, controller)


@pytest.mark.parametrize("resumes", [True, False])
def test_a_worker_is_stopped_under_streams(faulty: House, resumes: bool) -> None:
    """Row 3. It says nothing any more; when it does again, nobody gets what it has to say."""
    controller = faulty.start_controller("--resume" if resumes else "--no-resume", *QUICK)
    stopped = faulty.start_worker()
    faulty.wait_for_workers(1)
    ready = f"http://127.0.0.1:{faulty.port}/health/ready"
    other: list[Process] = []
    stopped_at = 0.0

    def stop() -> None:
        nonlocal stopped_at
        stopped_at = time.perf_counter()
        stopped.popen.send_signal(signal.SIGSTOP)
        if resumes:
            other.append(faulty.start_worker())

    records = asyncio.run(harmed(faulty.port, [asked(i, 60) for i in range(8)], stop))
    print(f"8 streams ended within {time.perf_counter() - stopped_at:.2f} s of the stop")
    assert check(records) == []
    assert ends(records) == ({"whole": 8} if resumes else {"worker_stalled": 8})
    if not resumes:
        assert httpx.get(ready).status_code == 503
    is_calm(faulty, controller)
    stopped.popen.send_signal(signal.SIGCONT)
    # what it still had to say ended with its connections
    is_calm(faulty, stopped)
    faulty.wait_for_workers(1 + resumes)
    later = asyncio.run(
        LoadClient(faulty.port).send_all((asked(i, 3) for i in range(8)), at_once=4)
    )
    assert ends(later) == {"whole": 8}


def test_a_worker_that_is_told_to_stop_hands_its_streams_over(faulty: House) -> None:
    """An upgrade worker by worker: nobody waits for the longest answer, and nobody loses one."""
    controller = faulty.start_controller()
    leaving = faulty.start_worker()
    faulty.wait_for_workers(1)

    def stop() -> None:
        faulty.start_worker()
        faulty.wait_for_workers(2)
        leaving.popen.terminate()

    records = asyncio.run(harmed(faulty.port, [asked(i, 600) for i in range(8)], stop))
    assert check(records) == [] and ends(records) == {"whole": 8}
    assert controller.log.count("a stream goes on at") == 8
    assert leaving.popen.wait(WAIT_S) == 0


def test_a_worker_hangs_on_its_way_out(faulty: House) -> None:
    """It has said that it goes, and wants to finish what it has; then it is stopped."""
    controller = faulty.start_controller("--no-resume", *QUICK)
    leaving = faulty.start_worker()
    faulty.wait_for_workers(1)

    def stop() -> None:
        leaving.popen.terminate()
        look_until(
            faulty.folder, controller.pid, lambda view: not view.num_workers, "it stays", WAIT_S
        )
        leaving.popen.send_signal(signal.SIGSTOP)

    records = asyncio.run(harmed(faulty.port, [asked(i, 1000) for i in range(8)], stop))
    assert check(records) == [] and ends(records) == {"worker_stalled": 8}
    is_calm(faulty, controller)


def test_the_controller_is_killed_under_streams(faulty: House) -> None:
    """Row 8: its clients are let go, the workers' places are free, and they come back to the next
    one."""
    controller = faulty.start_controller(*QUICK)
    port = faulty.port
    workers = [faulty.start_worker() for _ in range(2)]
    faulty.wait_for_workers(2)
    records = asyncio.run(harmed(port, [asked(i, 2000) for i in range(8)], kill(controller.pid)))
    assert {record.end for record in records} <= {"closed", "reset"}
    for worker in workers:
        is_calm(faulty, worker)
    controller.popen.wait(WAIT_S)
    faulty.start_controller(f"--port={port}", *QUICK)
    began = time.perf_counter()
    faulty.wait_for_workers(2)
    print(f"both workers are back {time.perf_counter() - began:.2f} s after the restart")
    listed = httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"]
    assert [model["id"] for model in listed] == [MODEL]
    again = asyncio.run(LoadClient(port).send_all((asked(i, 3) for i in range(8)), at_once=4))
    assert ends(again) == {"whole": 8}
    view = faulty.controller.look()
    assert view.num_workers == 2  # and none of them twice


def test_serve_is_killed_under_streams(faulty: House) -> None:
    """Row 8: nothing of it is left, and no client hangs."""
    server = faulty.serve()
    children = [psutil.Process(pid) for pid in server.children()]
    records = asyncio.run(harmed(faulty.port, [asked(i, 2000) for i in range(8)], kill(server.pid)))
    assert {record.end for record in records} <= {"closed", "reset"}
    _, alive = psutil.wait_procs(children, timeout=WAIT_S)
    assert alive == []
