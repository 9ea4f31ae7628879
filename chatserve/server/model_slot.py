"""ModelSlot: empty while the weights load, then holds the engine and the model it serves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from chatserve.config import adapted_name
from chatserve.engine.sequence import LoadedAdapter
from chatserve.errors import NoWorkerAvailable
from chatserve.protocol.control import ADAPTER_KEY, ModelCard, WorkerState, WorkerStatus
from chatserve.server.adapted import fingerprint_of
from chatserve.server.contract import Engine, ServedModel
from chatserve.server.error_log import ErrorLog
from chatserve.server.worker_metrics import measured

STALL_S = 30.0


class ModelSlot:
    """What this worker serves, and how far it is. Lives on the event loop; `progress` may be called
    from the loading thread.

    An engine that has work and makes no step for `stall_s` is stalled.
    """

    def __init__(self, names: Sequence[str], *, stall_s: float = STALL_S) -> None:
        self.is_draining = False
        self.created = int(time.time())
        self.loaded_bytes = 0
        self.total_bytes = 0
        self._names = tuple(names)
        self._stall_s = stall_s
        self._served: tuple[Engine, ServedModel] | None = None
        self.errors = ErrorLog()

    @classmethod
    def filled(cls, engine: Engine, model: ServedModel) -> ModelSlot:
        slot = cls(model.names)
        slot.fill(engine, model)
        return slot

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    @property
    def state(self) -> WorkerState:
        if self.is_draining:
            return "draining"
        if self.is_stalled:
            return "stalled"
        return "ready" if self._served else "loading"

    @property
    def is_stalled(self) -> bool:
        """Whether the engine, if there is one, has died or hangs."""
        if self._served is None:
            return False
        stats = self._served[0].stats()
        return not stats.is_alive or stats.last_token_age_s > self._stall_s

    def progress(self, loaded_bytes: int, total_bytes: int) -> None:
        """Note how much of the weights has been read."""
        self.loaded_bytes, self.total_bytes = loaded_bytes, total_bytes

    def fill(self, engine: Engine, model: ServedModel) -> None:
        """The model is loaded and the engine runs: from now on requests are served."""
        self._names = tuple(model.names)
        self._served = (engine, model)

    def close(self) -> None:
        """End what the model has started beside the engine."""
        if self._served is None:
            return
        _, model = self._served
        for each in (model.grammars, model.renderer):
            if each is not None:
                each.close()

    @property
    def engine(self) -> Engine | None:
        return self._served[0] if self._served else None

    def served(self) -> tuple[Engine, ServedModel]:
        """Raises `NoWorkerAvailable` while the weights are still loading."""
        if self._served is None:
            raise NoWorkerAvailable(f"{self.describe_progress()}; try again soon")
        return self._served

    def describe_progress(self) -> str:
        """How far it is, in words."""
        if self._served is not None:
            return f"{self.names[0]} is {self.state}"
        how_far = f" ({100 * self.loaded_bytes // self.total_bytes} %)" if self.total_bytes else ""
        return f"{self.names[0]} is still loading{how_far}"

    def cards(self) -> list[ModelCard]:
        """The base under each of its names, then each with each adapter."""
        if self._served is None:
            return [ModelCard(name=name, created=self.created) for name in self.names]
        model = self._served[1]

        def card(name: str, parent: str | None, adapter: LoadedAdapter | None) -> ModelCard:
            description = dict(model.description)
            if adapter is not None:
                description = {
                    "trained_on": (adapter.base or "")[:200],
                    ADAPTER_KEY: adapter.fingerprint,
                }
                if adapter.reward is not None:  # it writes nothing
                    description |= {"reward_model": True, "embeddings_only": True}
            return ModelCard(
                name=name,
                created=self.created,
                parent=parent,
                context_length=model.context_length,
                description={**description, "fingerprint": fingerprint_of(model, adapter)},
            )

        return [
            *(card(name, None, None) for name in self.names),
            *(
                card(adapted_name(base, name), base, adapter)
                for base in self.names
                for name, adapter in model.adapters.loaded().items()
            ),
        ]

    def status(self) -> WorkerStatus:
        """What the next heartbeat says."""
        progress: dict[str, Any] = {}
        if self._served is not None:
            engine, model = self._served
            stats = engine.stats()
            progress = {
                "fingerprint": model.fingerprint,
                "tick": stats.tick,
                "last_token_age_s": stats.last_token_age_s,
                "num_running": stats.num_running,
                "num_waiting": stats.num_waiting,
                "free_kv_tokens": stats.free_kv_tokens,
                "num_places": engine.admission.hard_limit,
                "wait_s": engine.admission.wait_s,
            }
        return WorkerStatus(
            state=self.state,
            models=self.cards(),
            loaded_bytes=self.loaded_bytes,
            total_bytes=self.total_bytes,
            metrics=measured(self._served, self.errors),
            **progress,
        )
