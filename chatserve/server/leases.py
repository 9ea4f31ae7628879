"""A worker as the controller knows it, and the claims of requests on it.

Who has a claim is told when the worker is lost. Knows no clock and no other worker.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from chatserve.errors import ChatserveError
from chatserve.protocol.control import WorkerStatus


@dataclass
class Worker:
    """One registered worker, as far as the controller knows."""

    worker_id: str
    base_url: str
    status: WorkerStatus
    seen_at: float
    moved_at: float
    ready_at: float | None = None
    leases: set[Lease] = field(default_factory=set)
    is_refusing: bool = False
    is_set_aside: bool = False
    """It gets nothing more to do, as it is to go."""
    has_stalled: bool = False
    """What it had to do was taken from it, as it made no step; it has made none since."""
    num_ejections: int = 0
    ejected_at: float = 0.0
    ejected_until: float | None = None
    last_pick: int = 0

    @property
    def num_in_flight(self) -> int:
        return len(self.leases)

    @property
    def has_work(self) -> bool:
        """As far as it has said, or was given since."""
        return bool(self.leases or self.status.num_running or self.status.num_waiting)

    @property
    def load(self) -> int:
        """Sequences running or waiting; requests dispatched since the last heartbeat count too."""
        return max(self.num_in_flight, self.status.num_running + self.status.num_waiting)

    @property
    def is_full(self) -> bool:
        """Whether it was given all that it takes, and has not answered any of it."""
        return 0 < self.status.num_places <= self.num_in_flight

    @property
    def ready_s(self) -> float:
        """For how long it has been ready, as far as it has been seen to move."""
        return 0.0 if self.ready_at is None else self.moved_at - self.ready_at

    def serves(self, model: str) -> bool:
        return any(card.name == model for card in self.status.models)

    def fingerprint(self, model: str) -> str | None:
        """Of the numbers that answer for `model`."""
        for card in self.status.models:
            if card.name == model:
                return str(card.description.get("fingerprint", self.status.fingerprint))
        return None

    def lose(self, loss: ChatserveError) -> None:
        """Tell all that have a claim on it."""
        for lease in list(self.leases):
            # what an error is raised through stays in it: each has its own
            lease.lose(copy.copy(loss))


def _cannot_move() -> bool:
    return False


class Lease:
    """One request's claim on a worker; counted until it is released, at best by `with`.

    `on_loss` is called when the worker is lost; `loss` says why. `on_sent_on` is called when it
    goes and another one could take over, perhaps more than once. `can_move`: whether the request
    could go on at another worker now.
    """

    def __init__(self, worker: Worker, model: str = "") -> None:
        self.worker = worker
        self.model = model
        self.loss: ChatserveError | None = None
        self.on_loss: Callable[[], object] | None = None
        self.on_sent_on: Callable[[], object] | None = None
        self.can_move: Callable[[], bool] = _cannot_move
        worker.leases.add(self)

    def lose(self, loss: ChatserveError) -> None:
        if self.loss is None:
            self.loss = loss
            if self.on_loss is not None:
                self.on_loss()

    def send_on(self) -> None:
        """Its worker goes, and another one is there."""
        if self.loss is None and self.on_sent_on is not None:
            self.on_sent_on()

    def release(self) -> None:
        self.on_loss = self.on_sent_on = None
        self.worker.leases.discard(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
