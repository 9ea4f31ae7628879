"""Room: what is free for a model, what the others would give back, and who should go for it.

Measures and counts; unloads nobody. The choice is `policy.py`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from chatserve.errors import CannotLoad, ChatserveError, DoesNotFit, NoRoomForModel
from chatserve.server.leases import Worker
from chatserve.server.repertoire.measure import Estimate, Measure
from chatserve.server.repertoire.model import Model
from chatserve.server.repertoire.policy import Holding, LoadingPolicy, Shortage, make_room


class Room:
    """`worker_of` a model, where the registry knows one; `is_busy`: it has something to do."""

    def __init__(
        self,
        policy: LoadingPolicy,
        measure: Measure,
        worker_of: Callable[[Model], Worker | None],
        is_busy: Callable[[Model], bool],
    ) -> None:
        self._policy = policy
        self._measure = measure
        self._worker_of = worker_of
        self._is_busy = is_busy

    async def look(
        self, model: Model, others: Callable[[], Sequence[Model]], may_evict: bool
    ) -> Sequence[str]:
        """Who has to go, so that there is room for `model`; nobody where it fits, or where only
        its worker can tell. Waits for those of the `others` that go already.

        Raises `NoRoomForModel`, or `CannotLoad` where there can be none.
        """
        if not self._policy.auto_load and self._policy.max_bytes is None:
            return []  # the worker itself says whether it fits
        while True:
            estimate = await self._measure(model.weights)
            if estimate is None:
                return []
            model.num_bytes = estimate.num_bytes
            holding = others()
            free_bytes = self._free_bytes(estimate, holding)
            found = make_room(estimate.num_bytes, free_bytes, map(self.holding, holding))
            if isinstance(found, Shortage):
                leaving = [each.going for each in holding if each.going is not None]
                if not leaving:
                    raise self._no_room(model, estimate, found)
                await asyncio.wait(leaving, return_when=asyncio.FIRST_COMPLETED)
                continue
            if found and not (may_evict and self._policy.auto_load):
                names = ", ".join(found)
                raise NoRoomForModel(
                    f"{model.name} needs {_gb(estimate.num_bytes)} and "
                    f"{_gb(max(0, free_bytes))} are free; unload {names} first",
                    retry_after_s=5,
                )
            return found

    def _free_bytes(self, estimate: Estimate, others: Sequence[Model]) -> int:
        if self._policy.max_bytes is not None:
            return self._policy.max_bytes - sum(self._bytes_of(each) for each in others)
        not_yet = 0
        for each in others:
            if each.phase == "loading":
                worker = self._worker_of(each)
                taken = worker.status.loaded_bytes if worker else 0
                not_yet += max(0, self._bytes_of(each) - taken)
        return estimate.free_bytes - not_yet

    def holding(self, model: Model) -> Holding:
        is_busy = model.phase != "ready" or self._is_busy(model)
        return Holding(model.name, self._gives_back(model), model.used_at, is_busy)

    def _gives_back(self, model: Model) -> int:
        """What is free when it is gone. Its plan counts one sequence; of what is free, which has
        been measured, its worker may hold more than that."""
        worker = self._worker_of(model)
        metrics = worker.status.metrics if worker else None
        if self._policy.max_bytes is not None or metrics is None:
            return self._bytes_of(model)
        # of a card the bytes are everybody's: when too little comes back the next worker says so
        held = metrics.rss_bytes if metrics.device == "cpu" else metrics.device_used_bytes
        return max(self._bytes_of(model), held)

    def _bytes_of(self, model: Model) -> int:
        if model.num_bytes is not None:
            return model.num_bytes
        worker = self._worker_of(model)
        return worker.status.total_bytes if worker else 0

    def _no_room(self, model: Model, estimate: Estimate, lack: Shortage) -> ChatserveError:
        need = f"{model.name} needs {_gb(estimate.num_bytes)}"
        limit = self._policy.max_bytes
        if lack.is_for_good:
            there = (
                f"--max-loaded-bytes allows {_gb(limit)}"
                if limit is not None
                else f"there are {_gb(lack.free_bytes + lack.idle_bytes + lack.busy_bytes)}, "
                "with all other models unloaded"
            )
            return CannotLoad(
                f"{need}, {there}; use a smaller model or form, or a shorter --context-length",
                exit_code=DoesNotFit.exit_code,
            )
        return NoRoomForModel(
            f"{need} and {_gb(lack.free_bytes + lack.idle_bytes)} can be had; "
            f"{', '.join(lack.busy)} is busy in {_gb(lack.busy_bytes)}; try again when it is idle",
            retry_after_s=5,
        )


def _gb(num_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"
