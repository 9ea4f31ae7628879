"""A random mix of faults over a controller, workers and the networks between, by seed.

`chatserve serve` keeps one worker, the mix another one; a proxy stands before each, and one before
some of the clients. While requests of all kinds run, workers die and stop, networks fail and the
disk is full. Then it is calm: everything must come to rest, and every history must hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.faults.client import LoadClient, Record
from tests.faults.history import Malformed
from tests.faults.house import Fronts, House, Process, fronts, house
from tests.faults.invariants import check, outcome
from tests.faults.proxy import BYTE_BY_BYTE, Fault, FaultProxy, Faults, seeded
from tests.faults.traffic import Traffic
from tests.faults.window import View, look

CALM_S = 5.0
CLIENT_TIMEOUT_S = 60.0
MAX_KEPT = 5000
FLAGS = (
    "--heartbeat-interval-s=0.2", "--heartbeat-expiry-s=2", "--stall-timeout-s=1",
    "--resume-timeout-s=20",
)  # fmt: skip


@dataclass
class Story:
    """What a mix did and what came of it. `calm_s`: until all slots were free, once it was calm."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    calm_s: float | None = None

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: faults {dict(self.faults)}, outcomes {dict(self.outcomes)}, "
            f"{len(self.violations)} violations, calm after {self.calm_s} s"
        )


def run_mix(
    folder: Path,
    seed: int,
    *,
    seconds: float,
    flags: tuple[str, ...] = (),
    calm_s: float = 30.0,
    **environment: str,
) -> Story:
    """`environment` is that of all processes. The story is printed, too, for its seed."""
    story = Story(seed)
    with house(folder) as rig:
        try:
            asyncio.run(_Mix(rig, story, environment).run(seconds, flags, calm_s))
        finally:
            print(story)
    return story


class _Mix:
    def __init__(self, rig: House, story: Story, environment: dict[str, str]) -> None:
        self._rig = rig
        self._story = story
        self._environment = environment
        self._choose = random.Random(story.seed)
        self._fronts: Fronts
        self._serve: Process
        self._worker: Process
        self._stopped: set[int] = set()
        self._is_calm = asyncio.Event()

    async def run(self, seconds: float, flags: tuple[str, ...], calm_s: float) -> None:
        async with self._standing(flags) as (clients, spoilt):
            stop = asyncio.Event()
            seed = self._story.seed
            sure = Traffic(f"sure {seed}", cancelled=0.15, say=20, step_s=0.005)
            weak = Traffic(f"weak {seed}", cancelled=0.15, say=20, step_s=0.005)
            sending = [
                asyncio.create_task(clients[0].keep_busy(sure.draw, at_once=10, stop=stop)),
                asyncio.create_task(clients[1].keep_busy(weak.draw, at_once=3, stop=stop)),
            ]
            may_be_lost = "--no-resume" in flags
            auditing = asyncio.create_task(self._audit(clients, spoilt, stop, may_be_lost))
            await self._rage(time.monotonic() + seconds)
            self._is_calm.set()
            calm_at = time.monotonic()
            stop.set()
            await asyncio.gather(*sending)
            await self._come_to_rest(calm_at, calm_s)
            await auditing
            await self._serves_again()

    @contextlib.asynccontextmanager
    async def _standing(
        self, flags: tuple[str, ...]
    ) -> AsyncIterator[tuple[tuple[LoadClient, LoadClient], FaultProxy]]:
        async with fronts(self._rig.folder) as self._fronts:
            environment = self._environment | self._fronts.environment
            self._serve = await asyncio.to_thread(
                lambda: self._rig.serve(*FLAGS, *flags, **environment)
            )
            self._worker = await self._start_worker()
            await asyncio.to_thread(self._rig.wait_for_workers, 2)
            async with FaultProxy(self._rig.port, _passing_faults(self._story.seed)) as spoilt:
                clients = tuple(
                    LoadClient(port, timeout_s=CLIENT_TIMEOUT_S)
                    for port in (self._rig.port, spoilt.port)
                )
                yield (clients[0], clients[1]), spoilt

    async def _start_worker(self) -> Process:
        environment = self._environment | self._fronts.environment
        return await asyncio.to_thread(lambda: self._rig.start_worker(**environment))

    # Faults -------------------------------------------------------------------------------------

    async def _rage(self, deadline: float) -> None:
        kinds: dict[str, Callable[[float], Awaitable[None]]] = {
            "kill": self._kill, "stop": self._stop, "partition": self._partition,
            "delay": self._delay, "cut": self._cut, "bytes": self._bytes, "disk": self._disk,
        }  # fmt: skip
        # each once, in any order, before chance alone decides
        order = self._choose.sample(list(kinds), k=len(kinds))
        while time.monotonic() < deadline:
            name = order.pop() if order else self._choose.choice(list(kinds))
            self._story.faults[name] += 1
            await kinds[name](min(self._choose.uniform(0.2, 2.0), deadline - time.monotonic()))
            await asyncio.sleep(self._choose.uniform(0.0, 0.5))
            if self._worker.popen.poll() is not None:
                self._worker = await self._start_worker()

    def _victim(self) -> int | None:
        """A worker's process."""
        pids = [self._worker.pid, *self._serve.children()]
        return self._choose.choice(pids)

    def _proxy(self) -> FaultProxy:
        """Before a worker that is there; workers that were killed leave theirs behind."""
        return self._choose.choice(self._fronts.proxies[-3:])

    async def _kill(self, _seconds: float) -> None:
        _signal(self._victim(), signal.SIGKILL)

    async def _stop(self, seconds: float) -> None:
        victim = self._victim()
        _signal(victim, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        _signal(victim, signal.SIGCONT)

    async def _partition(self, seconds: float) -> None:
        proxy = self._proxy()
        proxy.partition()
        await asyncio.sleep(seconds)
        proxy.heal()

    async def _delay(self, seconds: float) -> None:
        await self._weather(Fault(delay_s=2.0), seconds)

    async def _bytes(self, seconds: float) -> None:
        await self._weather(BYTE_BY_BYTE, seconds)

    async def _weather(self, fault: Fault, seconds: float) -> None:
        proxy = self._proxy()
        proxy.weather = fault
        await asyncio.sleep(seconds)
        proxy.weather = Fault()

    async def _cut(self, _seconds: float) -> None:
        self._proxy().reset_all()

    async def _disk(self, seconds: float) -> None:
        """No file of the controller can grow: neither what it keeps nor its log."""
        process = psutil.Process(self._serve.pid)
        _, hard = process.rlimit(resource.RLIMIT_FSIZE)
        process.rlimit(resource.RLIMIT_FSIZE, (0, hard))
        await asyncio.sleep(seconds)
        process.rlimit(resource.RLIMIT_FSIZE, (hard, hard))

    # What must hold -----------------------------------------------------------------------------

    async def _audit(
        self,
        clients: tuple[LoadClient, LoadClient],
        spoilt: FaultProxy,
        stop: asyncio.Event,
        may_be_lost: bool,
    ) -> None:
        """Check what has ended, again and again, so that a long mix needs no long memory."""
        while True:
            is_last = stop.is_set() and all(
                record.end is not None for client in clients for record in client.records
            )
            for client in clients:
                ended = [record for record in client.records if record.end is not None]
                client.records = [record for record in client.records if record.end is None]
                self._story.violations += check(
                    ended, harmed=spoilt.harmed, may_be_lost=may_be_lost
                )
                self._story.outcomes.update(map(_safe_outcome, ended))
            if is_last:
                return
            await asyncio.sleep(0.5)

    async def _come_to_rest(self, calm_at: float, calm_s: float) -> None:
        """All slots are free, in every process that is there."""
        while True:
            views = [view for view in map(self._look, self._pids()) if view is not None]
            busy = [view for view in views if not view.is_calm]
            if not busy and len(views) == 3:
                self._story.calm_s = round(time.monotonic() - calm_at, 2)
                return
            if time.monotonic() > calm_at + calm_s:
                self._story.violations.append(f"not calm after {calm_s} s: {busy or views}")
                return
            await asyncio.sleep(0.1)

    def _pids(self) -> list[int]:
        return [self._serve.pid, self._worker.pid, *self._serve.children()]

    def _look(self, pid: int) -> View | None:
        try:
            return look(self._rig.folder, pid)
        except OSError:
            # it has just begun, or just died
            return None

    async def _serves_again(self) -> None:
        """Every request of a calm server is answered."""
        await asyncio.to_thread(self._rig.wait_for_workers, 2)
        client = LoadClient(self._rig.port, timeout_s=CLIENT_TIMEOUT_S)
        traffic = Traffic(self._story.seed, cancelled=0, bad=0)
        await client.send_all(traffic.take(20), at_once=4)
        self._story.violations += check(client.records)
        outcomes = Counter(map(_safe_outcome, client.records))
        if set(outcomes) - {"done", "200"}:
            self._story.violations.append(f"calm, and yet {dict(outcomes)}")


def _passing_faults(seed: int) -> Callable[[int], Faults]:
    """Random faults of a client's connection, but none in which it would wait for ever."""
    plan = seeded(seed, share=0.4)

    def passing(number: int) -> Faults:
        faults = plan(number)
        if "stall" in (faults.up.then, faults.down.then):
            return Faults(*(dataclasses.replace(each, then="reset") for each in
                            (faults.up, faults.down)))  # fmt: skip
        return faults

    return passing


def _signal(pid: int | None, kind: signal.Signals) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, kind)


def _safe_outcome(record: Record) -> str:
    try:
        return outcome(record)
    except Malformed:
        return "malformed"
