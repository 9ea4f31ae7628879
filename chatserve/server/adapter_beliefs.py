"""Which adapters each base should have as requests have asked, and which its workers say they have.

Pure book-keeping: knows no HTTP and asks nobody.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from chatserve.config import adapted_name
from chatserve.protocol.adapters import LoadAdapter
from chatserve.protocol.control import ADAPTER_KEY, ModelCard, WorkerStatus

MAX_UNLOADED = 1000
"""Names that are remembered as unloaded: a worker that missed it, or starts anew, may have them."""

Key = tuple[str, str]
"""A base, by the first of its names, and an adapter."""


@dataclass(frozen=True)
class Belief:
    """What the last request about an adapter has brought. `asked` None: it is unloaded."""

    number: int
    asked: LoadAdapter | None = None
    fingerprint: str | None = None


class AdapterBeliefs:
    """What nobody has asked for, as an adapter of a worker's command line, is left as it is."""

    def __init__(self) -> None:
        self._beliefs: dict[Key, Belief] = {}
        # of each worker: adapters with fingerprints by its last message, and what it was told
        # since, with what it said to that where it did not do it
        self._brought: dict[str, Mapping[Key, str]] = {}
        self._told: dict[str, dict[int, str]] = {}
        self._numbers = itertools.count(1)
        self._incoming: tuple[Key, str] | None = None

    def __len__(self) -> int:
        """How much is remembered."""
        told = sum(map(len, self._told.values()))
        return len(self._beliefs) + len(self._brought) + len(self._told) + told

    def hear(self, worker_id: str, status: WorkerStatus) -> WorkerStatus:
        """`status` without the adapters that this worker should not have, or not in this version:
        no request may reach those before the worker has been put right."""
        cards = list(_adapters_of(status))
        self._brought[worker_id] = {key: _fingerprint(card) for key, card in cards if key}
        due = [card for key, card in cards if key is None or self._is_due(key, card)]
        return status.model_copy(update={"models": due})

    def forget(self, worker_id: str) -> None:
        """It begins anew: what it was told is nothing to go by."""
        self._told.pop(worker_id, None)

    def loaded(self, key: Key, asked: LoadAdapter, fingerprint: str, told: Iterable[str]) -> None:
        """`told` are the workers that serve it now."""
        self._note(key, Belief(next(self._numbers), asked, fingerprint), told)

    def unloaded(self, key: Key, told: Iterable[str]) -> None:
        """`told` are the workers that do not serve it now."""
        has_been_seen = any(key in brought for brought in self._brought.values())
        if key not in self._beliefs and not has_been_seen:
            return
        self._note(key, Belief(next(self._numbers)), told)
        unloaded = [each for each, belief in self._beliefs.items() if belief.asked is None]
        for old in unloaded[:-MAX_UNLOADED]:
            del self._beliefs[old]

    @contextmanager
    def incoming(self, key: Key, fingerprint: str) -> Iterator[None]:
        """Meanwhile workers change over to another version, each at its own time."""
        self._incoming = (key, fingerprint)
        try:
            yield
        finally:
            self._incoming = None

    def differences(self, worker_id: str) -> list[tuple[Key, Belief]]:
        """What the worker has to be told; nothing twice."""
        brought = self._brought.get(worker_id, {})
        told = self._told.get(worker_id, {})
        return [
            (key, belief)
            for key, belief in self._beliefs.items()
            if brought.get(key) != belief.fingerprint and belief.number not in told
        ]

    def tell(self, worker_id: str, belief: Belief, refusal: str = "") -> None:
        """It has been told, and has done it or has said why it does not."""
        current = {each.number for each in self._beliefs.values()}
        told = self._told.get(worker_id, {})
        kept = {number: said for number, said in told.items() if number in current}
        self._told[worker_id] = {**kept, belief.number: refusal}

    def is_wanted(self, key: Key) -> bool:
        """Whether a request has loaded it."""
        belief = self._beliefs.get(key)
        return belief is not None and belief.asked is not None

    def said(self, worker_id: str, key: Key) -> str | None:
        """Why a worker does not serve what is wanted; empty where it does, None before it knows of
        it."""
        return self._told.get(worker_id, {}).get(self._beliefs[key].number)

    def keep(self, worker_ids: Iterable[str]) -> None:
        """Forget all other workers."""
        known = set(worker_ids)
        for table in (self._brought, self._told):
            for gone in table.keys() - known:
                del table[gone]

    def _note(self, key: Key, belief: Belief, told: Iterable[str]) -> None:
        self._beliefs.pop(key, None)
        self._beliefs[key] = belief  # the latest is last
        for worker_id in told:
            self.tell(worker_id, belief)

    def _is_due(self, key: Key, card: ModelCard) -> bool:
        belief = self._beliefs.get(key)
        fingerprint = _fingerprint(card)
        return (
            belief is None
            or belief.fingerprint == fingerprint
            or self._incoming == (key, fingerprint)
        )


def base_of(status: WorkerStatus) -> str:
    """The first name of the model that a worker serves."""
    return next((card.name for card in status.models if card.parent is None), "")


def _adapters_of(status: WorkerStatus) -> Iterator[tuple[Key | None, ModelCard]]:
    """Each card with its key; None for the base's own."""
    base = base_of(status)
    for card in status.models:
        if card.parent is None:
            yield None, card
        else:
            yield (base, card.name.removeprefix(adapted_name(card.parent, ""))), card


def _fingerprint(card: ModelCard) -> str:
    return str(card.description.get(ADAPTER_KEY, ""))
