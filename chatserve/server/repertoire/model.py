"""Model: one name, its weights, and how far they are on the way into memory, or out of it."""

from __future__ import annotations

import asyncio
import copy
import os
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
    """`is_first`: the server was started with it, and ends with it. `is_lasting`: it was named when
    the server was started, and not by a request. `num_bytes`: what it takes, as
    far as anybody knows. `num_held`: requests on their way to a worker."""

    name: str
    weights: str
    is_first: bool = False
    is_lasting: bool = True
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
    def may_be_forgotten(self) -> bool:
        """Whether it was asked for in vain, by a name or a path that is none perhaps."""
        return self.phase == "failed" and not self.is_lasting and not self.num_held

    @property
    def is_loading(self) -> bool:
        """Whether somebody works on it, be it that it has to leave first."""
        return self.loaded is not None and not self.loaded.done()

    def outcome(self) -> asyncio.Future[None]:
        """Of the load that is under way, or was the last, for one who waits. An error is each one's
        own: what it is raised through stays in it."""
        assert self.loaded is not None
        own: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def tell(loaded: asyncio.Future[None]) -> None:
            if own.done():
                return
            if (error := loaded.exception()) is None:
                own.set_result(None)
            else:
                own.set_exception(copy.copy(error))
                own.exception()  # nobody may be waiting

        self.loaded.add_done_callback(tell)
        return own

    def without_path(self, message: str) -> str:
        """For everybody: where its files lie is for operators."""
        return without_path(message, self.weights, self.name)

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


def without_path(message: str, weights: str, name: str) -> str:
    """`message` with the name of a model in the place of its path; an alias may stay."""
    is_path = any(separator and separator in weights for separator in (os.sep, os.altsep))
    return message.replace(weights, name) if is_path else message
