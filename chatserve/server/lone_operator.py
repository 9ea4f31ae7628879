"""The operator's routes of a worker that is alone: the one worker there is to look at."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from chatserve.server.model_slot import ModelSlot
from chatserve.server.operator_routes import LONE_WORKER, OperatorRoutes, WorkerSeen


class LoneOperator(OperatorRoutes):
    """Of the engine in `slot`."""

    def __init__(self, slot: ModelSlot) -> None:
        self._slot = slot
        super().__init__(
            self._only, slot.errors, is_draining=lambda: slot.is_draining, more=self._models
        )

    @asynccontextmanager
    async def watching(self, hear: Callable[[], None] | None = None) -> AsyncIterator[None]:
        async with super().watching(hear or self._listen):
            yield

    def _listen(self) -> None:
        self.hear(LONE_WORKER, self._slot.status())

    def _only(self) -> list[WorkerSeen]:
        status = self._slot.status()
        return [(LONE_WORKER, status.state, "", status)]

    def _models(self) -> dict[str, object]:
        slot = self._slot
        return {
            "models": [
                {
                    "name": name, "state": slot.state, "loaded_bytes": slot.loaded_bytes,
                    "total_bytes": slot.total_bytes,
                }
                for name in slot.names
            ]
        }  # fmt: skip
