"""What a loaded network's weights take, by device, as they lie in memory. Estimates nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from chatserve.models.fallback import FallbackModel
from chatserve.models.kernel_matrix import KernelMatrix

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class WeightBytes:
    """`by_device`: all weights. `read_per_token`: what each new token reads of them.

    An embedding that is not the head, too, is only looked up: a token reads one row of it.
    """

    by_device: Mapping[str, int]
    read_per_token: int

    @property
    def total(self) -> int:
        return sum(self.by_device.values())


def weight_bytes(model: Any) -> WeightBytes:
    """Measure any of our networks."""
    if isinstance(model, FallbackModel):
        by_device = _measure([model])
        return WeightBytes(by_device, sum(by_device.values()))
    places = model.destinations()
    targets = {id(place.target): place.target for place in places.values()}
    by_device = _measure(targets.values())
    total = sum(by_device.values())
    embedding = places[_EMBEDDING].target
    is_read = _HEAD not in places or places[_HEAD].target is embedding
    looked_up = 0 if is_read else sum(_measure([embedding]).values())
    return WeightBytes(by_device, total - looked_up)


def _measure(roots: Any) -> dict[str, int]:
    num_bytes: Counter[str] = Counter()
    for device, size in _holdings(roots, set()):
        num_bytes[device] += size
    return dict(num_bytes)


def _holdings(things: Any, seen: set[object]) -> Iterator[tuple[str, int]]:
    """Device and bytes of every matrix and tensor that `things` own, each memory once."""
    for thing in things:
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            key: object = (thing.device, storage.data_ptr() or id(thing))
            if key not in seen:
                seen.add(key)
                yield str(thing.device), storage.nbytes()
            continue
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, KernelMatrix):
            yield "cpu", thing.num_bytes
        elif isinstance(thing, dict):
            yield from _holdings(thing.values(), seen)
        elif isinstance(thing, list | tuple):
            yield from _holdings(thing, seen)
        elif type(thing).__module__.startswith(("chatserve.", "transformers.", "torch.nn.")):
            yield from _holdings(getattr(thing, "__dict__", {}).values(), seen)
