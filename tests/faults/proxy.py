"""FaultProxy: a TCP proxy that does to bytes what bad networks and bad neighbours do.

Knows no HTTP. Faults of a connection are planned when it comes (by its number, or by seed); the
weather, that of all connections, may change at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Result = TypeVar("Result")
Then = Literal["stall", "close", "reset", "close half"]
TIMEOUT_S = 30.0
READ_BYTES = 64 * 1024
PAUSE_S = 0.005
_SIZES = (1, 1, 2, 3, 5, 8, 13, 34)


@dataclass(frozen=True)
class Fault:
    """What becomes of the bytes in one direction.

    After `after` bytes it does `then`. Before each piece it waits for `delay_s`. A piece is of at
    most `piece_bytes`; with `seed` of a random size instead, most of them tiny. Behind `pause_at`
    bytes the rest waits for a moment.
    """

    after: int | None = None
    then: Then = "reset"
    delay_s: float = 0.0
    piece_bytes: int | None = None
    seed: int | None = None
    pause_at: int | None = None

    def pieces(self, choose: random.Random, data: bytes) -> Iterator[bytes]:
        start = 0
        while start < len(data):
            size = self.piece_bytes or len(data)
            if self.seed is not None:
                size = choose.choice(_SIZES)
            yield data[start : start + size]
            start += size


NONE = Fault()
BYTE_BY_BYTE = Fault(piece_bytes=1)


@dataclass(frozen=True)
class Faults:
    """Of one connection: on the way up to the server, and down to the client."""

    up: Fault = NONE
    down: Fault = NONE


Plan = Callable[[int], Faults]


def clear(_number: int) -> Faults:
    return Faults()


def always(up: Fault = NONE, down: Fault = NONE) -> Plan:
    return lambda _number: Faults(up, down)


def scripted(*faults: Faults) -> Plan:
    """One for each connection in their order; those behind them are left in peace."""
    return lambda number: faults[number] if number < len(faults) else Faults()


def seeded(seed: int, *, share: float = 0.5, most_bytes: int = 4000) -> Plan:
    """Of so many connections one direction has a random fault; the same for the same seed."""

    def plan(number: int) -> Faults:
        choose = random.Random(f"{seed} {number}")
        if choose.random() >= share:
            return Faults()
        then: Then = choose.choice(("stall", "close", "reset", "close half"))
        fault = choose.choice((
            Fault(after=choose.randrange(most_bytes), then=then),
            Fault(delay_s=choose.choice((0.01, 0.1))),
            Fault(seed=choose.randrange(2**32)),
        ))  # fmt: skip
        return Faults(up=fault) if choose.random() < 0.2 else Faults(down=fault)

    return plan


class FaultProxy:
    """Listens on `port` and passes everything on to `target` on this machine.

    `weather` holds for all bytes, on connections new and old. `harmed` are the ports of the clients
    on whose connections bytes were lost. Made and used on one event loop.
    """

    def __init__(self, target: int, plan: Plan = clear) -> None:
        self.target = target
        self.plan = plan
        self.weather = NONE
        self.port = 0
        self.num_connections = 0
        self.harmed: set[int] = set()
        self._links: set[_Link] = set()
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._server: asyncio.Server
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1000)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.heal()
        self.reset_all()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def num_open(self) -> int:
        return len(self._links)

    def partition(self) -> None:
        """Nothing passes in either direction until `heal`; new connections wait, too."""
        self._is_open.clear()
        self.harmed.update(link.client_port for link in self._links)

    def heal(self) -> None:
        self._is_open.set()

    def reset_all(self) -> None:
        """Cut every connection that there is, both sides by an RST."""
        for link in list(self._links):
            link.end("reset")

    async def passable(self) -> None:
        await self._is_open.wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, self.num_connections = self.num_connections, self.num_connections + 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        link = _Link(self, reader, writer)
        self._links.add(link)
        try:
            if not self._is_open.is_set():
                self.harmed.add(link.client_port)
            await link.run(self.plan(number))
        finally:
            self._links.discard(link)
            self._tasks.discard(task)


class _Link:
    """One client's connection and the one behind it."""

    def __init__(
        self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.client_port: int = writer.get_extra_info("peername")[1]
        self._proxy = proxy
        self._client = (reader, writer)
        self._writers = [writer]
        self._ended = asyncio.Event()

    async def run(self, faults: Faults) -> None:
        ended = asyncio.create_task(self._ended.wait())
        try:
            opening = asyncio.create_task(self._open())
            await asyncio.wait({opening, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not opening.done() or opening.exception() is not None:
                opening.cancel()
                self.end("reset")
                return
            reader, writer = opening.result()
            self._writers.append(writer)
            jobs = (
                self._pump(self._client[0], writer, faults.up),
                self._pump(reader, self._client[1], faults.down),
            )
            both = asyncio.create_task(_all(*jobs))
            await asyncio.wait({both, ended}, return_when=asyncio.FIRST_COMPLETED)
            both.cancel()
            await asyncio.gather(both, return_exceptions=True)
        finally:
            ended.cancel()
            self.end("close")
            for writer in self._writers:
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        await self._proxy.passable()
        return await asyncio.open_connection("127.0.0.1", self._proxy.target)

    def end(self, how: Literal["close", "reset"]) -> None:
        if how == "reset" and not self._ended.is_set():
            self._proxy.harmed.add(self.client_port)
        self._ended.set()
        for writer in self._writers:
            if how == "reset":
                _reset(writer)
            else:
                writer.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault
    ) -> None:
        choose = random.Random(fault.seed)
        num_passed = 0
        try:
            while data := await reader.read(READ_BYTES):
                if fault.pause_at is not None and 0 < fault.pause_at - num_passed < len(data):
                    first = fault.pause_at - num_passed
                    await self._send(writer, data[:first], fault, choose)
                    await asyncio.sleep(PAUSE_S)
                    num_passed, data = num_passed + first, data[first:]
                left = len(data) if fault.after is None else fault.after - num_passed
                num_passed += len(data)
                await self._send(writer, data[:left], fault, choose)
                if left < len(data):
                    self._proxy.harmed.add(self.client_port)
                    self._do(fault.then, writer)
                    # what comes now is lost, and its sender does not know
                    while await reader.read(READ_BYTES):
                        pass
                    return
            await self._proxy.passable()
            if writer.can_write_eof():
                writer.write_eof()
        except OSError:
            # one side has cut the connection: so does the proxy
            self.end("reset")

    async def _send(
        self, writer: asyncio.StreamWriter, data: bytes, fault: Fault, choose: random.Random
    ) -> None:
        for part in fault.pieces(choose, data):
            for piece in self._proxy.weather.pieces(choose, part):
                if delay_s := fault.delay_s + self._proxy.weather.delay_s:
                    await asyncio.sleep(delay_s)
                await self._proxy.passable()
                writer.write(piece)
                await writer.drain()
                if len(piece) < len(data):
                    # others run in between: the reader may see this piece alone
                    await asyncio.sleep(0)

    def _do(self, then: Then, writer: asyncio.StreamWriter) -> None:
        if then == "close half":
            writer.write_eof()
        elif then != "stall":
            self.end(then)


async def _all(*jobs: Coroutine[Any, Any, None]) -> None:
    async with asyncio.TaskGroup() as group:
        for job in jobs:
            group.create_task(job)


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class ThreadedProxy:
    """A `FaultProxy` on a loop of its own, for tests that are not coroutines."""

    def __init__(self, proxy: FaultProxy, loop: asyncio.AbstractEventLoop) -> None:
        self.proxy = proxy
        self.port = proxy.port
        self.url = f"http://127.0.0.1:{proxy.port}"
        self._loop = loop

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(TIMEOUT_S)

    def do(self, change: Callable[[FaultProxy], Result]) -> Result:
        """Run `change` on the proxy's loop: `do(FaultProxy.partition)`."""

        async def work() -> Result:
            return change(self.proxy)

        return self.call(work())


@contextlib.contextmanager
def proxying(target: int, plan: Plan = clear) -> Iterator[ThreadedProxy]:
    """A proxy in front of the port `target`, in a thread."""
    started: threading.Event = threading.Event()
    running: list[tuple[ThreadedProxy, asyncio.Event]] = []

    async def main() -> None:
        stopped = asyncio.Event()
        async with FaultProxy(target, plan) as proxy:
            running.append((ThreadedProxy(proxy, asyncio.get_running_loop()), stopped))
            started.set()
            await stopped.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="fault proxy")
    thread.start()
    assert started.wait(TIMEOUT_S)
    proxy, stopped = running[0]
    try:
        yield proxy
    finally:
        proxy.do(lambda _: stopped.set())
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
