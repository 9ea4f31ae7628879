"""What became of a request: noted where it is told, read where the request began.

One context of a task has one; knows no log and no route.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class Outcome:
    """What became of the request that is being answered."""

    status: int = 0
    error: Exception | None = None
    error_status: int = 0


_outcome: ContextVar[Outcome | None] = ContextVar("outcome", default=None)


def begin() -> Outcome:
    """Of the request that begins in this task."""
    outcome = Outcome()
    _outcome.set(outcome)
    return outcome


def note_status(status: int) -> None:
    if (outcome := _outcome.get()) is not None:
        outcome.status = status


def note_error(error: Exception, status: int) -> None:
    """`error` is told to the client; `status` is what it has, or would have before the answer."""
    if (outcome := _outcome.get()) is not None:
        outcome.error, outcome.error_status = error, status
