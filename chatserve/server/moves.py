"""The workers that one request goes to, one after the other, until one has answered it.

Says where to go next, waits where there is nobody yet, and when to give up. Sends nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from chatserve.errors import ChatserveError, ModelNotFound, NoWorkerAvailable
from chatserve.server.registry import Lease, WorkerRegistry

# a request that kills whoever answers it must not go through all workers
MAX_FAILURES = 2


@dataclass(frozen=True)
class ResumePolicy:
    """`timeout_s`: how long one move may take, waiting for a worker included."""

    is_on: bool = True
    timeout_s: float = 60.0
    ping_s: float = 15.0


RESUME = ResumePolicy()


class Moves:
    """Of one request for `model`."""

    def __init__(self, registry: WorkerRegistry, model: str, policy: ResumePolicy) -> None:
        self._registry = registry
        self._model = model
        self._policy = policy
        self._num_failures = 0
        self._unfit: set[str] = set()
        self._loss: ChatserveError | None = None
        self._deadline = 0.0

    def lose(self, loss: ChatserveError, *, has_moved_on: bool = False) -> None:
        """A worker did not answer to the end. Raises `loss` when it is no use to go on.

        `has_moved_on`: it has brought the answer further.
        """
        if self._loss is None or has_moved_on:
            self._deadline = asyncio.get_running_loop().time() + self._policy.timeout_s
        self._num_failures = 0 if has_moved_on else self._num_failures + 1
        self._loss = loss
        if not self._policy.is_on or self._registry.is_over or self._num_failures >= MAX_FAILURES:
            raise loss

    @property
    def has_lost(self) -> bool:
        """Whether a worker has failed it."""
        return self._loss is not None

    def rule_out(self, worker_id: str) -> None:
        """It is well, but it has no place for this answer, or cannot go on with it."""
        self._unfit.add(worker_id)

    async def next(self, fingerprint: str | None = None) -> Lease:
        """A worker to ask: before the first loss at once, then as soon as there is one.

        `fingerprint`: it must have these very numbers. Raises what `pick` raises, or the loss when
        nobody has come in time.
        """
        if self._loss is None:
            return self._registry.pick(self._model, without=self._unfit)
        with self._registry.changes() as change, contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._deadline):
                while True:
                    change.clear()
                    with contextlib.suppress(NoWorkerAvailable, ModelNotFound):
                        return self._registry.pick(
                            self._model, fingerprint=fingerprint, without=self._unfit
                        )
                    if self._registry.is_closing:
                        break
                    await change.wait()
        raise self._loss

    async def pause(self, seconds: float) -> None:
        """Give a worker time that cannot go on just now. Raises the loss when time is over."""
        assert self._loss is not None
        left = self._deadline - asyncio.get_running_loop().time()
        if left <= seconds or self._registry.is_closing:
            raise self._loss
        await asyncio.sleep(seconds)
