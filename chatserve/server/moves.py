"""The workers that one request goes to, one after the other, until one has answered it.

Says where to go next, waits where there is nobody yet, and when to give up. Sends nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from chatserve.errors import ChatserveError, ModelNotFound, NoWorkerAvailable
from chatserve.server.leases import Lease
from chatserve.server.registry import WorkerRegistry

# a request that kills whoever answers it must not go through all workers
MAX_FAILURES = 2
# nor through them again and again, each time a little further: fewer than a supervisor's restarts
MAX_LOSSES = 4
LOSSES_WITHIN_S = 600.0
# who says that it has time at once is not asked without a pause
MIN_PAUSE_S = 0.1


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
        self._lost_at: list[float] = []
        self._unfit: set[str] = set()
        self._busy_until: dict[str, float] = {}
        self._loss: ChatserveError | None = None
        # of the move that is going on
        self._deadline: float | None = None

    def lose(self, loss: ChatserveError, *, has_moved_on: bool = False) -> None:
        """A worker did not answer to the end. Raises `loss` when it is no use to go on.

        `has_moved_on`: it has brought the answer further.
        """
        self._num_failures = 0 if has_moved_on else self._num_failures + 1
        now = asyncio.get_running_loop().time()
        self._lost_at = [at for at in self._lost_at if at > now - LOSSES_WITHIN_S] + [now]
        self.leave(loss)
        if self._num_failures >= MAX_FAILURES:
            raise loss
        if len(self._lost_at) >= MAX_LOSSES:
            raise type(loss)(
                f"{len(self._lost_at)} workers were lost over this answer within "
                f"{LOSSES_WITHIN_S / 60:g} minutes; it may be what ends them"
            )

    def leave(self, loss: ChatserveError) -> None:
        """A worker shall not answer to the end, but has not failed. Raises `loss`, as `lose`."""
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._policy.timeout_s
        self._loss = loss
        if not self._policy.is_on or self._registry.is_over:
            raise loss

    def arrive(self) -> None:
        """A worker answers: what comes next is another move."""
        self._deadline = None
        self._busy_until.clear()

    def stay(self) -> None:
        """Nobody else has consented: the move that was tried is none."""
        self._deadline = None

    @property
    def has_lost(self) -> bool:
        """Whether a worker has failed it."""
        return self._loss is not None

    def rule_out(self, worker_id: str) -> None:
        """It is well, but cannot go on with this answer."""
        self._unfit.add(worker_id)

    def put_off(self, worker_id: str, seconds: float) -> None:
        """It has no room just now. Raises the loss when time is over."""
        now = asyncio.get_running_loop().time()
        if self._loss is not None and self._deadline is not None and now >= self._deadline:
            raise self._loss
        self._busy_until[worker_id] = now + max(seconds, MIN_PAUSE_S)

    def pick_now(self, fingerprint: str | None) -> Lease | None:
        """A worker that is ready and has not been asked in vain; for a request that is answered."""
        if self._registry.is_over:
            return None
        now = asyncio.get_running_loop().time()
        busy = {each for each, until in self._busy_until.items() if until > now}
        with contextlib.suppress(NoWorkerAvailable, ModelNotFound):
            return self._registry.pick(
                self._model, fingerprint=fingerprint, without={*self._unfit, *busy}
            )
        return None

    @property
    def next_try_s(self) -> float | None:
        """Until one that had no room may have some; None where there is none such."""
        if not self._busy_until:
            return None
        return max(MIN_PAUSE_S, min(self._busy_until.values()) - asyncio.get_running_loop().time())

    async def next(self, fingerprint: str | None = None) -> Lease:
        """A worker to ask: before the first loss at once, then as soon as there is one.

        `fingerprint`: it must have these very numbers. Raises what `pick` raises, or the loss when
        nobody has come in time.
        """
        if self._loss is None:
            return self._registry.pick(self._model, without={*self._unfit, *self._busy_until})
        now = asyncio.get_running_loop().time
        with self._registry.changes() as change:
            while True:
                change.clear()
                busy = {each: until for each, until in self._busy_until.items() if until > now()}
                with contextlib.suppress(NoWorkerAvailable, ModelNotFound):
                    return self._registry.pick(
                        self._model, fingerprint=fingerprint, without={*self._unfit, *busy}
                    )
                is_last = self._registry.is_closing or self._registry.is_retired(self._model)
                if is_last or now() >= self._deadline_of_move:
                    raise self._loss
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(min([self._deadline_of_move, *busy.values()])):
                        await change.wait()

    @property
    def _deadline_of_move(self) -> float:
        assert self._deadline is not None
        return self._deadline
