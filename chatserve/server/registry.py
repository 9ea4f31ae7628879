"""WorkerRegistry: which workers are alive, what they serve, and which one gets the next request.

Knows no HTTP and no processes; its clock is handed in. Everything is a dictionary look-up: asking
changes nothing but what time has changed already. Whoever has a claim on a worker is told when it
is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from chatserve.errors import (
    ChatserveError,
    ModelNotFound,
    NoWorkerAvailable,
    Overloaded,
    RegistrationRefused,
    WorkerLost,
    WorkerStalled,
)
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server.leases import Lease, Worker

EJECTION_S = 0.5
MAX_EJECTION_S = 30.0
FORGIVE_S = 120.0
MAX_RETRY_S = 60

ModelState = Literal["unreachable", "starting", "loading", "draining", "stalled", "ready"]


@dataclass(frozen=True)
class ModelReadiness:
    """How far one model is, for `/health/ready`."""

    name: str
    state: ModelState
    loaded_bytes: int = 0
    total_bytes: int = 0


class WorkerRegistry:
    """All workers by id.

    `expected` are the models that `/health/ready` waits for. A worker is gone after `expiry_s` of
    silence, stalled after `stall_s` with work and no step (0: never). `on_change` is called when a
    worker comes, goes or changes state.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        expiry_s: float = 10.0,
        stall_s: float = 30.0,
        expected: Iterable[str] = (),
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.on_change = on_change
        self._clock = clock
        self._expiry_s = expiry_s
        self._stall_s = stall_s or float("inf")
        # not those of workers that come from elsewhere
        self._expected = dict.fromkeys(expected, True)
        # their worker goes, and no other one is to come
        self._retired: set[str] = set()
        self._workers: dict[str, Worker] = {}
        # said goodbye, and still have something to finish
        self._leaving: list[Worker] = []
        self._listeners: set[asyncio.Event] = set()
        self._is_closing = False
        self._is_over = False
        # outlives the workers: a model does not vanish from the list while its worker restarts
        self._cards: dict[str, ModelCard] = {}
        self._picks = itertools.count(1)

    def expect(self, model: str, *, is_awaited: bool) -> None:
        """A model that may be served here, be it now or not. `is_awaited`: nothing is ready without
        it."""
        self._expected[model] = is_awaited
        self._tell()

    def unexpect(self, model: str) -> None:
        """It is served here no more than any other name."""
        self._expected.pop(model, None)
        self._retired.discard(model)
        self._tell()

    def retire(self, model: str, *, is_over: bool = False) -> None:
        """Nobody should wait for a worker of `model` any more; `is_over`: again they should."""
        if is_over:
            self._retired.discard(model)
        else:
            self._retired.add(model)
        self._tell()

    def is_retired(self, model: str) -> bool:
        """Whether no further worker of a model is to be expected, or of what stands beside it."""
        return bool(self._retired) and bool({model, model.rpartition(":")[0]} & self._retired)

    @property
    def is_closing(self) -> bool:
        """Whether no further worker is to be expected."""
        return self._is_closing

    def close(self) -> None:
        """Nobody should wait for a worker any more; those that are ready go on being picked."""
        self._is_closing = True
        self._tell()

    @property
    def is_over(self) -> bool:
        """Whether nothing may go on, not even at a worker that is ready."""
        return self._is_over

    def abort(self, reason: ChatserveError) -> None:
        """End all that is under way, with `reason`."""
        self._is_over = True
        for worker in [*self._workers.values(), *self._leaving]:
            worker.lose(reason)
        self.close()

    @contextlib.contextmanager
    def changes(self) -> Iterator[asyncio.Event]:
        """An event that is set whenever a worker comes, goes or changes state."""
        event = asyncio.Event()
        self._listeners.add(event)
        try:
            yield event
        finally:
            self._listeners.discard(event)

    def register(self, worker_id: str, base_url: str, status: WorkerStatus) -> None:
        """List a worker whose identity has been checked; again replaces what was known of it.

        Raises `RegistrationRefused` when a live worker at another address has this id.
        """
        self._expire()
        known = self._workers.get(worker_id)
        if known is not None and known.base_url != base_url:
            raise RegistrationRefused(
                f"worker id {worker_id} belongs to a live worker at {known.base_url}; "
                "start this worker anew"
            )
        for other in [w for w in self._workers.values() if w.base_url == base_url]:
            del self._workers[other.worker_id]
            if other.worker_id != worker_id:
                # one process listens on an address: whoever had it before is gone
                other.lose(_died())
        now = self._clock()
        worker = known or Worker(worker_id, base_url, status, seen_at=now, moved_at=now)
        worker.seen_at, worker.moved_at, worker.status = now, now, status
        worker.ejected_until = None
        worker.is_refusing = worker.has_stalled = worker.is_set_aside = False
        self._workers[worker_id] = worker
        self._remember(worker)
        self._tell()

    def heartbeat(self, worker_id: str, status: WorkerStatus) -> bool:
        """Note what a worker says of itself. False: unknown here, it should register."""
        self._expire()
        worker = self._workers.get(worker_id)
        if worker is None:
            return False
        now = self._clock()
        before, state_before = worker.status, self._state(worker)
        is_idle = not status.num_running and not status.num_waiting
        if is_idle or status.tick != before.tick:
            worker.moved_at, worker.has_stalled = now, False
        worker.seen_at, worker.status = now, status
        self._remember(worker)
        self._forget_unless_served(before.models)
        if self._state(worker) != state_before or status.models != before.models:
            self._tell()
        return True

    def leave(self, worker_id: str) -> None:
        """Forget a worker that says goodbye, and the models that nobody else serves or expects."""
        worker = self._workers.pop(worker_id, None)
        if worker is None:
            return
        self._forget_unless_served(worker.status.models)
        self._leaving = [each for each in (*self._leaving, worker) if each.leases]
        self._tell()

    def remove(self, worker_id: str) -> None:
        """Forget a worker whose process has died; its models stay known."""
        worker = self._workers.pop(worker_id, None)
        for each in [worker] if worker else self._leaving:
            if each.worker_id == worker_id:
                each.lose(_died())
        if worker is not None:
            self._tell()

    def eject(self, worker_id: str, *, is_refusing: bool = False) -> bool:
        """Send nothing more to a worker that failed, until `readmit`; longer each time.

        `is_refusing`: it takes no connections. What still comes from it may go on elsewhere, too.
        False where nothing has changed: its other streams tell of the same death.
        """
        worker = self._workers.get(worker_id)
        if worker is None:
            return False
        worker.is_refusing |= is_refusing
        now = self._clock()
        if worker.ejected_until is not None and now < worker.ejected_until:
            return False
        if now - worker.ejected_at > FORGIVE_S:
            worker.num_ejections = 0
        pause_s = min(EJECTION_S * 2**worker.num_ejections, MAX_EJECTION_S)
        worker.num_ejections += 1
        worker.ejected_at, worker.ejected_until = now, now + pause_s
        self._tell()
        return True

    def worker_to_probe(self, worker_id: str) -> Worker | None:
        """The worker, if it is ejected and has sat out its time."""
        worker = self._workers.get(worker_id)
        if worker is None or worker.ejected_until is None:
            return None
        return worker if self._clock() >= worker.ejected_until else None

    def set_aside(self, worker_id: str) -> bool:
        """Give a worker nothing more to do, until it registers anew; what it has, it finishes.

        False: unknown here.
        """
        worker = self._workers.get(worker_id)
        if worker is None:
            return False
        worker.is_set_aside = True
        self._tell()
        return True

    def readmit(self, worker_id: str) -> None:
        """Take an ejected worker back after a good probe."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.ejected_until = None
            worker.is_refusing = False
            self._tell()

    def pick(
        self, model: str, *, fingerprint: str | None = None, without: Collection[str] = ()
    ) -> Lease:
        """Claim the least busy ready worker for `model`; among equals the one idle for longest.

        `fingerprint`: only of workers that have these very numbers. `without`: ids of workers that
        are out of the question. Raises `ModelNotFound` for a name nobody has served,
        `NoWorkerAvailable` for one that nobody serves right now.
        """
        self._expire()
        if model not in self._cards and model not in self._expected:
            raise ModelNotFound(
                f"model {model[:100]!r} is not served here; there is "
                f"{', '.join(sorted({*self._cards, *self._expected})) or 'none yet'}",
                param="model",
            )
        serving = [w for w in self._workers.values() if w.serves(model)]
        ready = [
            worker
            for worker in serving
            if self._state(worker) == "ready"
            and worker.worker_id not in without
            and fingerprint in (None, worker.fingerprint(model))
        ]
        if not ready:
            states = ", ".join(self._state(w) for w in serving) or "gone"
            raise NoWorkerAvailable(
                f"no worker is ready for {model} (workers: {states}); try again in a moment"
            )
        worker = min(ready, key=lambda each: (each.is_full, each.load, each.last_pick))
        worker.last_pick = next(self._picks)
        if not worker.has_work:
            worker.moved_at = self._clock()  # what it does not do yet is not late
        return Lease(worker, model)

    def check_room(self, model: str | None = None) -> None:
        """Raises `Overloaded` when all that are ready are full; of any model, or of this one."""
        ready = [
            worker
            for worker in self._workers.values()
            if (model is None or worker.serves(model)) and self._state(worker) == "ready"
        ]
        if ready and all(worker.is_full for worker in ready):
            wait_s = min(worker.status.wait_s for worker in ready)
            retry_after_s = min(MAX_RETRY_S, max(1, math.ceil(wait_s)))
            num_requests = sum(worker.num_in_flight for worker in ready)
            raise Overloaded(
                f"{num_requests} requests are under way already, as many as the workers take; try "
                f"again in {retry_after_s} s",
                retry_after_s=retry_after_s,
            )

    def ready(self, model: str) -> list[Worker]:
        """All that can serve `model` now."""
        self._expire()
        serving = [worker for worker in self._workers.values() if worker.serves(model)]
        return [worker for worker in serving if self._state(worker) == "ready"]

    def find(self, worker_id: str) -> Worker | None:
        """What is known of it, if it is there."""
        return self._workers.get(worker_id)

    def overview(self) -> list[tuple[Worker, ModelState]]:
        """All workers, and what each is at."""
        self._expire()
        return [(worker, self._state(worker)) for worker in self._workers.values()]

    def worker_ids(self) -> list[str]:
        self._expire()
        return list(self._workers)

    def forget(self, model: str) -> None:
        """Name `model` no more, unless somebody serves it."""
        if not any(worker.serves(model) for worker in self._workers.values()):
            self._cards.pop(model, None)

    def forget_family(self, model: str) -> None:
        """The same with what is served beside it, as an adapter."""
        for card in list(self._cards.values()):
            if model in (card.name, card.parent):
                self.forget(card.name)

    def cards(self) -> list[ModelCard]:
        """The models of `/v1/models`: those served, also while their worker restarts.

        The expected ones come first, in the order they were named.
        """
        names = dict.fromkeys([*self._expected, *self._cards])
        return [self._cards[name] for name in names if name in self._cards]

    def readiness(self) -> list[ModelReadiness]:
        """The best state of each expected model, and of each that a worker has brought."""
        self._expire()
        names = dict.fromkeys(
            [*self._expected, *(c.name for w in self._workers.values() for c in w.status.models)]
        )
        return [self._readiness(name) for name in names]

    def is_ready(self) -> bool:
        """Whether every awaited model has a ready worker; where none is expected, any."""
        states = {model.name: model.state for model in self.readiness()}
        if self._expected:
            wanted = [name for name, is_awaited in self._expected.items() if is_awaited]
            return all(states[name] == "ready" for name in wanted)
        return "ready" in states.values()

    def stalled(self) -> list[Worker]:
        """Workers that have work and make no step."""
        self._expire()
        return [w for w in self._workers.values() if self._state(w) == "stalled"]

    def check(self) -> float | None:
        """Tell those who wait for a worker that is silent or stalled.

        Returns the seconds until there may be more to tell; None without workers.
        """
        self._expire()
        for worker in self.stalled():
            worker.has_stalled = True
            worker.lose(_stalled())
        now = self._clock()
        deadlines = [
            deadline
            for worker in self._workers.values()
            for deadline in (worker.seen_at + self._expiry_s, worker.moved_at + self._stall_s)
            if deadline >= now
        ]
        return min(deadlines) - now if deadlines else None

    def _tell(self) -> None:
        self.on_change()
        for event in self._listeners:
            event.set()
        self._let_move()

    def _let_move(self) -> None:
        """What a worker that goes would still finish goes on at another one, where there is one."""
        leaving = [
            worker
            for worker in self._workers.values()
            if worker.is_refusing or self._state(worker) == "draining"
        ]
        for worker in (*self._leaving, *leaving):
            for lease in [each for each in worker.leases if each.can_move()]:
                fingerprint = worker.fingerprint(lease.model)
                if any(
                    other is not worker and other.fingerprint(lease.model) == fingerprint
                    for other in self.ready(lease.model)
                ):
                    lease.send_on()

    def _readiness(self, name: str) -> ModelReadiness:
        order: tuple[ModelState, ...] = (
            "unreachable", "starting", "stalled", "draining", "loading", "ready"
        )  # fmt: skip
        serving = [w for w in self._workers.values() if w.serves(name)]
        if not serving:
            return ModelReadiness(name, "starting")
        best = max(serving, key=lambda worker: order.index(self._state(worker)))
        return ModelReadiness(
            name, self._state(best), best.status.loaded_bytes, best.status.total_bytes
        )

    def _state(self, worker: Worker) -> ModelState:
        if worker.ejected_until is not None:
            return "unreachable"
        is_to_move = worker.has_work or worker.has_stalled
        if is_to_move and self._clock() - worker.moved_at > self._stall_s:
            return "stalled"
        return "draining" if worker.is_set_aside else worker.status.state

    def _remember(self, worker: Worker) -> None:
        if worker.status.state == "ready":
            if worker.ready_at is None:
                worker.ready_at = worker.moved_at
            self._cards.update((card.name, card) for card in worker.status.models)

    def _forget_unless_served(self, cards: Iterable[ModelCard]) -> None:
        for card in cards:
            if card.name not in self._expected:
                self.forget(card.name)

    def _expire(self) -> None:
        """Drop the silent ones; called by every question, so no timer is needed."""
        deadline = self._clock() - self._expiry_s
        silent = [w.worker_id for w in self._workers.values() if w.seen_at < deadline]
        for worker_id in silent:
            self._workers.pop(worker_id).lose(_stalled())
        if silent:
            self._tell()


def _died() -> WorkerLost:
    return WorkerLost("the worker died while it was answering; send the request again")


def _stalled() -> WorkerStalled:
    return WorkerStalled("the worker makes no step any more; send the request again")
