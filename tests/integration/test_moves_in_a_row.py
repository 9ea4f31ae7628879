"""One move does not spoil the next: who had no room has some later; who must go has not failed.

Workers are scripts, as in `test_moves.py`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.types import Message

from chatserve.errors import WorkerLost
from chatserve.protocol.sse import encode_event
from chatserve.server.leases import Lease, Worker
from chatserve.server.moves import Moves, ResumePolicy
from chatserve.server.registry import WorkerRegistry
from chatserve.server.relay import Asked, Relay, RelayedStream
from chatserve.server.stream_memory import MemoryBudget, StreamMemory
from chatserve.server.units import UnitReader
from chatserve.server.upstream import Lost, Upstream
from chatserve.server.worker_client import WorkerClient
from tests.integration.test_moves import (
    BEGIN,
    DIED,
    FULL,
    HEAD,
    LAST,
    REST,
    START,
    WHOLE,
    add,
    frames_of,
    house_of,
    read_answer,
    status,
    token,
    unchunked,
)
from tests.servers import ScriptedWorker, chunked, read_until


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def refusal(code: int, retry_after_s: int) -> list[Any]:
    head = f"HTTP/1.1 {code} No\r\nRetry-After: {retry_after_s}\r\nContent-Length: 2\r\n\r\n{{}}"
    return [head.encode()]


def test_who_was_full_when_it_began_may_go_on_with_it(stack: ExitStack) -> None:
    house = house_of(stack, ResumePolicy(timeout_s=8.0))
    full = add(house, "a", refusal(429, 9), REST)
    add(house, "b", [HEAD, BEGIN, token(0), token(1)])
    assert frames_of(house.post().content) == WHOLE
    assert len(full.requests) == 2


def test_who_was_full_is_asked_again_when_the_other_one_has_died(stack: ExitStack) -> None:
    house = house_of(stack, ResumePolicy(timeout_s=8.0))
    full = add(house, "a", refusal(429, 1), FULL)
    add(house, "b", [DIED])
    assert house.post().content == WHOLE
    assert len(full.requests) == 2


def test_nobody_waits_for_who_has_no_time_while_another_has(stack: ExitStack) -> None:
    house = house_of(stack, ResumePolicy(timeout_s=8.0))
    add(house, "a", [HEAD, BEGIN, token(0), token(1)])
    busy = add(house, "b", refusal(503, 3600))
    add(house, "c", REST)
    assert frames_of(house.post().content) == WHOLE
    assert len(busy.requests) == 1


def test_a_drain_does_not_wait_for_who_has_no_time(stack: ExitStack) -> None:
    house = house_of(stack, ResumePolicy(timeout_s=7200.0))
    add(house, "a", [HEAD, BEGIN, token(0)])
    busy = add(house, "b", refusal(503, 3600))
    with closing(house.open()) as sock:
        house.wait_for(lambda: bool(busy.requests))
        house.do(house.registry.close)
        assert b"worker_died" in read_answer(sock)


def test_workers_that_are_told_to_go_have_not_failed(stack: ExitStack) -> None:
    """An upgrade, one worker after the other, while a prompt is read: no token comes in between."""
    house = house_of(stack)
    names = "abcd"
    workers = [add(house, "a", [HEAD, BEGIN, None])]
    with closing(house.open()) as sock:
        content = read_until(sock, encode_event("role"))
        for before, name in pairwise(names):
            rest = [*map(token, range(4)), LAST] if name == names[-1] else [None]
            workers.append(add(house, name, [HEAD, chunked(START), *rest]))
            state = status(state="draining")
            house.do(lambda before=before, state=state: house.registry.heartbeat(before, state))  # type: ignore[misc]
            house.wait_for(lambda: bool(workers[-1].requests))
        content += read_answer(sock)
    assert frames_of(unchunked(content)) == WHOLE


def test_of_a_worker_that_was_told_to_go_nobody_says_that_it_died(stack: ExitStack) -> None:
    house = house_of(stack, ResumePolicy(timeout_s=0.3))
    add(house, "a", [HEAD, BEGIN, token(0), None])
    with closing(house.open()) as sock:
        content = read_until(sock, encode_event("0"))
        unfit = [b"HTTP/1.1 409 No\r\nContent-Length: 2\r\n\r\n{}"]
        add(house, "b", unfit)
        house.do(lambda: house.registry.heartbeat("a", status(state="draining")))
        content += read_answer(sock)
    assert b"worker_died" in content and b"was stopped" in content


def test_each_move_has_its_own_time() -> None:
    """A prompt is read again for longer than a move may take; then the worker is lost, too."""

    async def late_second_move() -> str:
        registry = WorkerRegistry(time.monotonic)
        registry.register("a", "http://a", status())
        moves = Moves(registry, "fake", ResumePolicy(timeout_s=0.05))
        moves.lose(WorkerLost("first"), has_moved_on=True)
        moves.arrive()
        await asyncio.sleep(0.06)
        registry.remove("a")
        moves.lose(WorkerLost("second"))
        waiting = asyncio.ensure_future(moves.next("fp"))
        await asyncio.sleep(0)
        assert not waiting.done()
        registry.register("b", "http://b", status())
        return (await waiting).worker.worker_id

    assert asyncio.run(late_second_move()) == "b"


def test_a_lease_that_was_lost_before_its_request_went_out() -> None:
    """Its worker may hang: nobody would be told a second time."""

    async def ask(worker: ScriptedWorker) -> None:
        registry = WorkerRegistry(time.monotonic)
        registry.register("a", worker.url, status())
        lease = registry.pick("fake")
        registry.remove("a")
        async with WorkerClient() as client:
            with pytest.raises(Lost, match="died"):
                await asyncio.wait_for(Upstream.open(client, registry, lease, "/", b"", {}), 20)
        assert lease.worker.num_in_flight == 0

    with ScriptedWorker([None]) as worker:
        asyncio.run(ask(worker))
    assert worker.requests == []


def test_an_answer_that_came_for_nobody_is_closed() -> None:
    """The connection to the client breaks in the same moment in which another worker goes on."""
    closed = threading.Event()
    worker = Worker("a", "http://a", status(), 0.0, 0.0)

    class Answer:
        status = 200
        has_journal = True

        def __init__(self) -> None:
            self.headers: dict[str, str] = {}
            self.lease = Lease(worker)

        async def read(self, _reader: object) -> bytes:
            raise Lost(WorkerLost("it died"))

        def close(self) -> None:
            self.lease.release()

    async def go_on(*_: object) -> Upstream:
        return cast(Upstream, Answer())

    async def send(message: Message) -> None:
        if message.get("body", b"").startswith(b": ping"):
            await asyncio.sleep(0.01)
            closed.set()
            raise OSError("it is gone")

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def relay() -> None:
        registry = WorkerRegistry(time.monotonic)
        memory = StreamMemory(MemoryBudget(), b"")
        memory.begin(b":s {}\n\n")
        stream = RelayedStream(
            cast(Relay, SimpleNamespace(go_on=go_on, policy=ResumePolicy())),
            Asked("/", "fake", b"", {}),
            Moves(registry, "fake", ResumePolicy()),
            cast(Upstream, Answer()),
            UnitReader(memory),
            memory,
            b"",
        )
        with pytest.raises(OSError, match="gone"):
            await stream({"type": "http"}, receive, send)

    asyncio.run(relay())
    assert closed.is_set() and worker.num_in_flight == 0
