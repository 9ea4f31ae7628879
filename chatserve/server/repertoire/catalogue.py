"""Catalogue: which models there are, by name, and who may give a name to what. Loads nothing."""

from __future__ import annotations

from collections.abc import Callable

from chatserve.errors import ModelConflict
from chatserve.server.registry import WorkerRegistry
from chatserve.server.repertoire.model import Model

MAX_MODELS = 256


class Catalogue:
    """The first ones first. The `registry` is told which names to expect."""

    def __init__(self, registry: WorkerRegistry, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._clock = clock
        self._models: dict[str, Model] = {}

    def declare(self, name: str, weights: str, *, is_first: bool, is_lasting: bool) -> Model:
        """A model of that name. Raises `ModelConflict`."""
        known = self._models.get(name)
        if known is not None and known.weights == weights:
            return known
        if known is not None and known.may_be_forgotten:
            self._forget(known)
        elif known is not None:
            raise ModelConflict(
                f"another model is called {name[:100]}; choose another name", param="name"
            )
        if len(self._models) >= MAX_MODELS:
            for vain in [each for each in self._models.values() if each.may_be_forgotten]:
                self._forget(vain)
        if len(self._models) >= MAX_MODELS:
            raise ModelConflict(f"there are {MAX_MODELS} models already; serve no more by this one")
        model = Model(name, weights, is_first, is_lasting=is_lasting, used_at=self._clock())
        self._models[name] = model
        self._registry.expect(name, is_awaited=is_first)
        return model

    def models(self) -> list[Model]:
        return list(self._models.values())

    def __getitem__(self, name: str) -> Model:
        return self._models[name]

    def find(self, name: str) -> Model | None:
        return self._models.get(name) or self._models.get(name.rpartition(":")[0])

    def _forget(self, model: Model) -> None:
        del self._models[model.name]
        self._registry.unexpect(model.name)
