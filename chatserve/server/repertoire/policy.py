"""Who makes room for a model, whose time is over, and what an operator says to that.

Knows numbers: no process, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LoadingPolicy:
    """`auto_load`: who asks for a model loads it, and others make room. `max_bytes`: of all models
    together; None: what is free. `keep_alive_s`: how long a model stays that nobody uses; None: for
    ever. `load_timeout_s`: how long who cannot be told of progress waits for a load."""

    auto_load: bool = False
    max_bytes: int | None = None
    keep_alive_s: float | None = None
    load_timeout_s: float = 300.0
    drain_s: float = 30.0


@dataclass(frozen=True)
class Holding:
    """A model that holds memory. `used_at`: when it last had something to do."""

    name: str
    num_bytes: int
    used_at: float
    is_busy: bool = False


@dataclass(frozen=True)
class Shortage:
    """There is no room, whoever goes. `is_for_good`: nor would there be if nobody were busy."""

    free_bytes: int
    idle_bytes: int
    busy_bytes: int
    busy: tuple[str, ...]
    is_for_good: bool


def make_room(
    need_bytes: int, free_bytes: int, holdings: Iterable[Holding]
) -> Sequence[str] | Shortage:
    """Whom to unload so that `need_bytes` fit: those not used for longest, and no more than it
    takes. Who has something to do stays."""
    idle: list[Holding] = []
    busy: list[Holding] = []
    for each in holdings:
        (busy if each.is_busy else idle).append(each)
    idle.sort(key=lambda each: each.used_at)
    going: list[Holding] = []
    lack = need_bytes - free_bytes
    while idle and lack > 0:
        going.append(idle.pop(0))
        lack -= going[-1].num_bytes
    if lack > 0:
        busy_bytes = sum(each.num_bytes for each in busy)
        return Shortage(
            free_bytes=max(0, free_bytes),
            idle_bytes=sum(each.num_bytes for each in going),
            busy_bytes=busy_bytes,
            busy=tuple(each.name for each in busy),
            is_for_good=lack > busy_bytes,
        )
    # a small one that went first may have gone in vain beside a large one; the newest stay first
    for each in reversed(going[:-1]):
        if lack + each.num_bytes <= 0:
            going.remove(each)
            lack += each.num_bytes
    return [each.name for each in going]


def expired(holdings: Iterable[Holding], now: float, keep_alive_s: float) -> list[str]:
    """Who has had nothing to do for `keep_alive_s`."""
    return [
        each.name for each in holdings if not each.is_busy and now - each.used_at >= keep_alive_s
    ]
