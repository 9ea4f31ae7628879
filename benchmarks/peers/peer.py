"""What the rounds ask of a peer."""

from __future__ import annotations

from typing import Protocol

from benchmarks.tasks import Figures, Task


class NotMeasured(Exception):
    """A peer could not do a task; the message says why."""


class Peer(Protocol):
    """One engine in one form, measured in one mode. Starts what it needs at the first task."""

    @property
    def name(self) -> str:
        """Engine and form, as in results: `llama.cpp q8_0`."""
        ...

    @property
    def mode(self) -> str: ...

    def measure(self, task: Task, round_: int) -> Figures | None:
        """The figures of a task of this mode; None for what the peer cannot do.

        Raises `NotMeasured` when it should have worked.
        """
        ...

    def close(self) -> None:
        """End every process that it started."""
        ...
