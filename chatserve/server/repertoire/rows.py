"""What is told of models: in `/v1/models`, `/admin/models` and `chatserve ps`. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatserve.server.leases import Worker
from chatserve.server.registry import ModelReadiness, WorkerRegistry
from chatserve.server.repertoire.model import Model, without_path
from chatserve.server.repertoire.models import Repertoire


class ModelRows:
    """Over the models of a `repertoire`, and those that workers bring from elsewhere."""

    def __init__(self, registry: WorkerRegistry, repertoire: Repertoire | None) -> None:
        self._registry = registry
        self._repertoire = repertoire

    def cards(self) -> list[dict[str, Any]]:
        """OpenAI's models; how far each is and what it takes stands among our own fields."""
        known = {card.name: card.to_openai() for card in self._registry.cards()}
        states = {each.name: each for each in self._registry.readiness()}
        models = [] if self._repertoire is None else self._repertoire.models()
        for name, card in known.items():
            base = card["parent"] or name
            model = next((each for each in models if each.name == base), None)
            if model is not None:
                card["chatserve"] |= self._brief(model)
            elif base in states:
                seen = states[base]
                card["chatserve"] |= {"state": seen.state, "bytes": seen.total_bytes or None}
        cards = []
        for model in models:
            cards += [
                known.pop(name)
                for name in [
                    model.name,
                    *(n for n, card in known.items() if card["parent"] == model.name),
                ]
                if name in known
            ] or [self._bare(model)]
        return [*cards, *known.values()]

    def rows(self, now: float) -> list[dict[str, Any]]:
        """For operators. `now` by the repertoire's clock."""
        rows = []
        repertoire = self._repertoire
        of_repertoire = set()
        if repertoire is not None:
            for model in repertoire.models():
                rows.append(self._row(repertoire, model, now))
                of_repertoire.add(model.name)
        states = {each.name: each for each in self._registry.readiness()}
        for card in self._registry.cards():
            if card.name in of_repertoire or card.parent is not None:
                continue
            ready = self._registry.ready(card.name)
            # a model is known longer than the last worker that had it
            state = states.get(card.name) or ModelReadiness(card.name, "starting")
            rows.append(
                {
                    "name": card.name,
                    "state": state.state,
                    "weights": None,
                    "bytes": state.total_bytes or None,
                    "loaded_bytes": state.loaded_bytes,
                    "total_bytes": state.total_bytes,
                    "memory_bytes": None,
                    "device": card.description.get("device"),
                    "running": sum(len(worker.leases) for worker in ready),
                    "idle_s": None,
                    "keep_alive_left_s": None,
                    "worker_id": ready[0].worker_id if ready else None,
                    "error": None,
                }
            )
        return rows

    def progress(self, model: Model) -> tuple[int, int]:
        """Bytes that are loaded, and of how many; 0 of 0 while nobody knows."""
        worker = self._repertoire.worker_of(model) if self._repertoire else None
        return (worker.status.loaded_bytes, worker.status.total_bytes) if worker else (0, 0)

    def _row(self, repertoire: Repertoire, model: Model, now: float) -> dict[str, Any]:
        loaded, total = self.progress(model)
        worker = repertoire.worker_of(model)
        is_busy = repertoire.is_busy(model)
        idle_s = None
        if model.phase == "ready":
            idle_s = 0.0 if is_busy else max(0.0, now - model.used_at)
        keep_s = repertoire.policy.keep_alive_s
        left_s = None if idle_s is None or keep_s is None else max(0.0, keep_s - idle_s)
        failure = model.failure
        return {
            "name": model.name,
            "state": self.state_of(model),
            "weights": model.weights,
            "bytes": self._bytes(model),
            "loaded_bytes": loaded,
            "total_bytes": total,
            "memory_bytes": _memory_of(worker),
            "device": self._device(model),
            "running": len(worker.leases) if worker else 0,
            "idle_s": None if idle_s is None else round(idle_s, 1),
            "keep_alive_left_s": None if left_s is None else round(left_s, 1),
            "worker_id": worker.worker_id if worker else None,
            "error": failure and {"message": failure.message, "exit_code": failure.exit_code},
        }

    def state_of(self, model: Model) -> str:
        """Of a model that is loaded, its worker's: it may have crashed, or be stalled."""
        if model.phase != "ready" or self._repertoire is None:
            return model.phase
        states = {each.name: each.state for each in self._registry.readiness()}
        return states.get(model.name, "starting")

    def state_in(self, seen: ModelReadiness) -> str:
        """What `/health/ready` says of it."""
        model = self._repertoire.find(seen.name) if self._repertoire else None
        is_here = model is None or model.phase in ("loading", "ready") or seen.state == "ready"
        return seen.state if is_here or model is None else model.phase

    def _device(self, model: Model) -> str | None:
        for card in self._registry.cards():
            if card.name == model.name and model.started is not None:
                device = card.description.get("device")
                return None if device is None else str(device)
        return None

    def _brief(self, model: Model) -> Mapping[str, Any]:
        brief: dict[str, Any] = {"state": self.state_of(model), "bytes": self._bytes(model)}
        if model.failure is not None:
            brief["error"] = model.without_path(model.failure.message)
        return brief

    def _bytes(self, model: Model) -> int | None:
        return model.num_bytes or self.progress(model)[1] or None

    def _bare(self, model: Model) -> dict[str, Any]:
        """Of a model that no worker has described yet."""
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "chatserve",
            "root": model.name,
            "parent": None,
            "chatserve": {"context_length": None, **self._brief(model)},
        }


def _memory_of(worker: Worker | None) -> int | None:
    """Main memory that its process holds, as its last heartbeat has it."""
    if worker is None or worker.status.metrics is None:
        return None
    return worker.status.metrics.rss_bytes or None


def as_seen_by(row: dict[str, Any], *, is_operator: bool) -> dict[str, Any]:
    """Where the files of a model lie is for operators, also in the last words of its worker."""
    if is_operator:
        return row
    error, weights = row["error"], row["weights"]
    if error and weights:
        error = {**error, "message": without_path(error["message"], weights, row["name"])}
    return {**row, "weights": None, "error": error}
