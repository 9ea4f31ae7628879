"""Model: one name, its weights, and how far they are on the way into memory, or out of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Literal, Protocol

from chatserve.errors import CannotLoad, ChatserveError, StartupError

Phase = Literal["unloaded", "loading", "ready", "draining", "failed"]


class Supervised(Protocol):
    """`chatserve.server.supervisor.Supervisor`, as a repertoire uses it."""

    @property
    def pid(self) -> int | None: ...
    async def run(self) -> None: ...
    def retire(self) -> None: ...
    def hurry(self) -> None: ...
    async def stop(self, *, kill_after_s: float, hurry: asyncio.Event | None = None) -> None: ...


class Started(Protocol):
    """A worker that is kept running. Its process, and with it `worker_id`, may be another one
    after a crash."""

    @property
    def supervisor(self) -> Supervised: ...
    @property
    def worker_id(self) -> str: ...
    def forget(self) -> None:
        """It has ended, and will not be started again."""
        ...


class Start(Protocol):
    """Makes the worker of a model, to be run."""

    def __call__(self, name: str, weights: str) -> Started: ...


@dataclass(eq=False)
class Model:
    """`is_first`: the server was started with it, and ends with it. `num_bytes`: what it takes, as
    far as anybody knows. `num_held`: requests on their way to a worker."""

    name: str
    weights: str
    is_first: bool = False
    phase: Phase = "unloaded"
    num_bytes: int | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    used_at: float = 0.0
    num_held: int = 0
    failure: CannotLoad | None = None
    failed_at: float = 0.0
    started: Started | None = None
    running: asyncio.Task[None] | None = None
    # who waits for it waits for `loaded`; `bringing` is the work, `going` that of the way out
    loaded: asyncio.Future[None] | None = None
    bringing: asyncio.Task[None] | None = None
    going: asyncio.Task[None] | None = None

    @property
    def is_loading(self) -> bool:
        """Whether somebody works on it, be it that it has to leave first."""
        return self.loaded is not None and not self.loaded.done()

    def give_up(self, error: Exception) -> None:
        """Tell those who wait for it."""
        if self.loaded is not None and not self.loaded.done():
            self.loaded.set_exception(error)
            self.loaded.exception()  # nobody may be waiting

    def fail(self, error: ChatserveError, now: float) -> None:
        """It cannot be loaded, or its worker was given up."""
        if not isinstance(error, CannotLoad):
            code = error.exit_code if isinstance(error, StartupError) else 1
            error = CannotLoad(error.message, exit_code=code)
        self.phase, self.failure, self.failed_at = "failed", error, now
