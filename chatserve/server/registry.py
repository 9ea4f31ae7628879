"""WorkerRegistry: which workers are alive, what they serve, and which one gets the next request.

Knows no HTTP and no processes; its clock is handed in. Everything is a dictionary look-up: asking
changes nothing but what time has changed already.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from chatserve.errors import ModelNotFound, NoWorkerAvailable, RegistrationRefused
from chatserve.protocol.control import ModelCard, WorkerStatus

EJECTION_S = 0.5
MAX_EJECTION_S = 30.0
FORGIVE_S = 120.0

ModelState = Literal["unreachable", "starting", "loading", "draining", "stalled", "ready"]


@dataclass
class Worker:
    """One registered worker, as far as the controller knows."""

    worker_id: str
    base_url: str
    status: WorkerStatus
    seen_at: float
    moved_at: float
    num_in_flight: int = 0
    num_ejections: int = 0
    ejected_at: float = 0.0
    ejected_until: float | None = None
    last_pick: int = 0

    @property
    def load(self) -> int:
        """Sequences running or waiting; requests dispatched since the last heartbeat count too."""
        return max(self.num_in_flight, self.status.num_running + self.status.num_waiting)

    def serves(self, model: str) -> bool:
        return any(card.name == model for card in self.status.models)


@dataclass(frozen=True)
class ModelReadiness:
    """How far one model is, for `/health/ready`."""

    name: str
    state: ModelState
    loaded_bytes: int = 0
    total_bytes: int = 0


class Lease:
    """One request's claim on a worker; counted until it is released, at best by `with`."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._is_open = True
        worker.num_in_flight += 1

    def release(self) -> None:
        if self._is_open:
            self._is_open = False
            self.worker.num_in_flight -= 1

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class WorkerRegistry:
    """All workers by id.

    `expected` are the models that `/health/ready` waits for. A worker is gone after `expiry_s` of
    silence, stalled after `stall_s` with work and no step. `on_change` is called when a worker
    comes, goes or changes state.
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
        self._stall_s = stall_s
        self._expected = tuple(expected)
        self._workers: dict[str, Worker] = {}
        # outlives the workers: a model does not vanish from the list while its worker restarts
        self._cards: dict[str, ModelCard] = {}
        self._picks = itertools.count(1)

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
            # one process listens on an address: whoever had it before is gone
            del self._workers[other.worker_id]
        now = self._clock()
        worker = known or Worker(worker_id, base_url, status, seen_at=now, moved_at=now)
        worker.seen_at, worker.moved_at, worker.status = now, now, status
        worker.ejected_until = None
        self._workers[worker_id] = worker
        self._remember(status)
        self.on_change()

    def heartbeat(self, worker_id: str, status: WorkerStatus) -> bool:
        """Note what a worker says of itself. False: unknown here, it should register."""
        self._expire()
        worker = self._workers.get(worker_id)
        if worker is None:
            return False
        now = self._clock()
        is_idle = not status.num_running and not status.num_waiting
        if is_idle or status.tick != worker.status.tick:
            worker.moved_at = now
        has_changed = status.state != worker.status.state
        before, worker.seen_at, worker.status = worker.status, now, status
        self._remember(status)
        self._forget_unless_served(before.models)
        if has_changed:
            self.on_change()
        return True

    def leave(self, worker_id: str) -> None:
        """Forget a worker that says goodbye, and the models that nobody else serves or expects."""
        worker = self._workers.pop(worker_id, None)
        if worker is None:
            return
        self._forget_unless_served(worker.status.models)
        self.on_change()

    def remove(self, worker_id: str) -> None:
        """Forget a worker whose process has died; its models stay known."""
        if self._workers.pop(worker_id, None) is not None:
            self.on_change()

    def eject(self, worker_id: str) -> None:
        """Send nothing more to a worker that failed, until `readmit`; longer each time."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        now = self._clock()
        if now - worker.ejected_at > FORGIVE_S:
            worker.num_ejections = 0
        pause_s = min(EJECTION_S * 2**worker.num_ejections, MAX_EJECTION_S)
        worker.num_ejections += 1
        worker.ejected_at, worker.ejected_until = now, now + pause_s
        self.on_change()

    def worker_to_probe(self, worker_id: str) -> Worker | None:
        """The worker, if it is ejected and has sat out its time."""
        worker = self._workers.get(worker_id)
        if worker is None or worker.ejected_until is None:
            return None
        return worker if self._clock() >= worker.ejected_until else None

    def readmit(self, worker_id: str) -> None:
        """Take an ejected worker back after a good probe."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.ejected_until = None
            self.on_change()

    def pick(self, model: str) -> Lease:
        """Claim the least busy ready worker for `model`; among equals the one idle for longest.

        Raises `ModelNotFound` for a name nobody has served, `NoWorkerAvailable` for one that
        nobody serves right now.
        """
        self._expire()
        if model not in self._cards and model not in self._expected:
            raise ModelNotFound(
                f"model {model[:100]!r} is not served here; there is "
                f"{', '.join(sorted({*self._cards, *self._expected})) or 'none yet'}",
                param="model",
            )
        serving = [w for w in self._workers.values() if w.serves(model)]
        ready = [worker for worker in serving if self._state(worker) == "ready"]
        if not ready:
            states = ", ".join(self._state(w) for w in serving) or "gone"
            raise NoWorkerAvailable(
                f"no worker is ready for {model} (workers: {states}); try again in a moment"
            )
        worker = min(ready, key=lambda worker: (worker.load, worker.last_pick))
        worker.last_pick = next(self._picks)
        return Lease(worker)

    def ready(self, model: str) -> list[Worker]:
        """All that can serve `model` now."""
        self._expire()
        serving = [worker for worker in self._workers.values() if worker.serves(model)]
        return [worker for worker in serving if self._state(worker) == "ready"]

    def worker_ids(self) -> list[str]:
        self._expire()
        return list(self._workers)

    def forget(self, model: str) -> None:
        """Name `model` no more, unless somebody serves it."""
        if not any(worker.serves(model) for worker in self._workers.values()):
            self._cards.pop(model, None)

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
        """Whether every expected model, and at least one, has a ready worker."""
        states = {model.name: model.state for model in self.readiness()}
        wanted = self._expected or tuple(name for name in states if states[name] == "ready")
        return bool(wanted) and all(states[name] == "ready" for name in wanted)

    def stalled(self) -> list[Worker]:
        """Workers that have work and make no step."""
        self._expire()
        return [w for w in self._workers.values() if self._state(w) == "stalled"]

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
        is_idle = not worker.status.num_running and not worker.status.num_waiting
        if not is_idle and self._clock() - worker.moved_at > self._stall_s:
            return "stalled"
        return worker.status.state

    def _remember(self, status: WorkerStatus) -> None:
        if status.state == "ready":
            self._cards.update((card.name, card) for card in status.models)

    def _forget_unless_served(self, cards: Iterable[ModelCard]) -> None:
        for card in cards:
            if card.name not in self._expected:
                self.forget(card.name)

    def _expire(self) -> None:
        """Drop the silent ones; called by every question, so no timer is needed."""
        deadline = self._clock() - self._expiry_s
        silent = [w.worker_id for w in self._workers.values() if w.seen_at < deadline]
        for worker_id in silent:
            del self._workers[worker_id]
        if silent:
            self.on_change()
