"""What became of a request: noted where it is told, read where the request began.

One context of a task has one; knows no log and no route.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Answered:
    """What an answer was, without a word of it. `model` is one that is served."""

    answer_id: str
    model: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reasons: tuple[str, ...]
    ttft_s: float | None


@dataclass(slots=True)
class Outcome:
    """What became of the request that is being answered. `trace_headers`: for who is asked on its
    behalf; empty where nothing is traced."""

    status: int = 0
    error: Exception | None = None
    error_status: int = 0
    answered: Answered | None = None
    model: str | None = None
    operation: str = ""
    trace_id: str = ""
    trace_headers: dict[str, str] = field(default_factory=dict)


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


def note_answer(answered: Answered) -> None:
    """All of an answer has been said."""
    if (outcome := _outcome.get()) is not None:
        outcome.answered = answered


def note_model(model: str) -> None:
    """The request is for this model, which there is."""
    if (outcome := _outcome.get()) is not None:
        outcome.model = model


def current_trace_id() -> str:
    """Of the request that is being answered in this task; empty where nothing is traced."""
    outcome = _outcome.get()
    return "" if outcome is None else outcome.trace_id


def current_trace_headers() -> Mapping[str, str]:
    outcome = _outcome.get()
    return {} if outcome is None else outcome.trace_headers
