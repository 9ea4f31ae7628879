"""One move does not spoil the next: who had no room has some later; who must go has not failed.

Workers are scripts, as in `test_moves.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
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
from chatserve.protocol.sse import DONE_FRAME, encode_event
from chatserve.server.leases import Lease, Worker
from chatserve.server.moves import Moves, ResumePolicy
from chatserve.server.registry import WorkerRegistry
from chatserve.server.relayed_stream import RelayedStream, Successors
from chatserve.server.stream_memory import MemoryBudget, StreamMemory
from chatserve.server.units import UnitReader
from chatserve.server.upstream import Asked, Lost, Upstream
from chatserve.server.worker_client import WorkerClient
from tests.house import STREAM
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
    body_of,
    frames_of,
    house_of,
    read_answer,
    status,
    token,
    unchunked,
)
from tests.servers import Script, ScriptedWorker, chunked, http_request, read_request, read_until


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def refusal(code: int, retry_after_s: int) -> list[Any]:
    # kept open it might be used again while the script closes it
    head = f"HTTP/1.1 {code} No\r\nConnection: close\r\nRetry-After: {retry_after_s}\r\n"
    return [f"{head}Content-Length: 2\r\n\r\n{{}}".encode()]


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


UNFIT = [b"HTTP/1.1 409 No\r\nContent-Length: 2\r\n\r\n{}"]


@pytest.mark.parametrize(
    "answers",
    [[UNFIT], [refusal(429, 3600)], [[DIED]], [[DIED], [DIED]]],
    ids=["unfit", "busy", "dies", "all die"],
)
def test_a_worker_that_goes_has_its_streams_until_another_consents(
    stack: ExitStack, answers: list[Any]
) -> None:
    house = house_of(stack)
    go_on = threading.Event()
    rest = [token(2), token(3), LAST]
    add(house, "a", [HEAD, BEGIN, token(0), go_on, token(1), *rest])
    with closing(house.open()) as sock:
        content = read_until(sock, encode_event("0"))
        asked = [add(house, f"b{i}", each) for i, each in enumerate(answers)]
        house.do(lambda: house.registry.heartbeat("a", status(state="draining")))
        house.wait_for(lambda: all(worker.requests for worker in asked))
        go_on.set()
        content += read_answer(sock)
    assert unchunked(content) == WHOLE


def test_a_worker_that_goes_hands_over_once_another_has_room(stack: ExitStack) -> None:
    """No change in the registry tells of it: it is asked again when it said."""
    house = house_of(stack)
    left = add(house, "a", [HEAD, BEGIN, token(0), token(1), None])
    with closing(house.open()) as sock:
        content = read_until(sock, encode_event("1"))
        busy = add(house, "b", refusal(429, 0), REST)
        house.do(lambda: house.registry.heartbeat("a", status(state="draining")))
        content += read_answer(sock)
    assert unchunked(content) == WHOLE
    assert len(busy.requests) == 2 and left.closed_by_peer.wait(20)


def test_a_worker_that_goes_is_told_so_while_its_client_reads_slowly(stack: ExitStack) -> None:
    """What is being sent when the other one consents reaches the client, and once."""
    house = house_of(stack)
    blocks = [b"%d-" % i + b"x" * 60_000 for i in range(120)]
    units = [chunked(encode_event(each) + b":t 0 %d\n\n" % i) for i, each in enumerate(blocks)]
    left = LeftWorker([HEAD, BEGIN, *units])
    stack.enter_context(left)
    house.list("a", left.url, status())
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        sock.connect(("127.0.0.1", house.controller.port))
        sock.settimeout(30)
        sock.sendall(http_request("POST", "/v1/chat/completions", STREAM))
        house.wait_for(left.is_stuck)
        asked = JournalReader(units)
        with asked:
            house.list("b", asked.url, status())
            # it is in the middle of a frame that nobody reads yet
            house.do(lambda: house.registry.heartbeat("a", status(state="draining")))
            content = frames_of(unchunked(read_answer(sock)))
    assert len(asked.requests) == 1
    begin, end = encode_event("role"), encode_event("usage") + DONE_FRAME
    assert content == begin + b"".join(map(encode_event, blocks)) + end


class LeftWorker(ScriptedWorker):
    """Says more than it is let."""

    num_sent = num_seen = num_looks = 0

    def answer(self, connection: socket.socket, script: Script) -> None:
        self.requests.append(read_request(connection))
        with contextlib.suppress(OSError), connection:
            for piece in script:
                assert isinstance(piece, bytes)
                connection.sendall(piece)
                self.num_sent += 1

    def is_stuck(self) -> bool:
        """It has said something, and nothing more for a while."""
        self.num_looks = self.num_looks + 1 if self.num_sent == self.num_seen > 0 else 0
        self.num_seen = self.num_sent
        return self.num_looks > 50


class JournalReader(ScriptedWorker):
    """Goes on from where the journal ends."""

    def __init__(self, units: list[bytes]) -> None:
        super().__init__([])
        self._units = units

    def answer(self, connection: socket.socket, script: Script) -> None:
        request = read_request(connection)
        self.requests.append(request)
        num_said = body_of(request)["journal"].count(":t ")
        for piece in (HEAD, chunked(START), *self._units[num_said:], LAST):
            connection.sendall(piece)
        connection.close()


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
            cast(Successors, SimpleNamespace(go_on=go_on)),
            ResumePolicy().ping_s,
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
