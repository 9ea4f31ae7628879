"""Deadlines: how long a request may wait and take, kept by one timer for all of them.

Knows times and which limit comes first; no engine, no HTTP. Nothing happens per token: the timer
sleeps until the first deadline that could have passed, looks, and sleeps again. Who is overdue
is ended a moment later, if it still is: a process that was stopped and goes on has a token to say.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from chatserve.engine.sequence import Phase
from chatserve.errors import (
    ChatserveError,
    FirstTokenTimeout,
    QueueTimeout,
    RequestTimeout,
    TokenGapTimeout,
    WorkerStalled,
)
from chatserve.options import TimeLimits

NO_LIMITS = TimeLimits(
    queue_timeout_s=0, first_token_timeout_s=0, token_gap_timeout_s=0, request_timeout_s=0
)
MIN_SLEEP_S = 0.01
GRACE_S = 0.2


class Timed(Protocol):
    """What is known of a sequence without asking the engine; times of `time.monotonic`."""

    @property
    def arrived_at(self) -> float: ...
    @property
    def spoke_at(self) -> float | None:
        """When its last token came."""
        ...


TimedKind = TypeVar("TimedKind", bound=Timed)


@dataclass(frozen=True)
class Deadline:
    """When a sequence is overdue, and by which limit."""

    due: float
    kind: type[ChatserveError]
    limit_s: float

    def error(self) -> ChatserveError:
        return self.kind(_MESSAGES[self.kind].format(f"{self.limit_s:g} s"))


_MESSAGES: Mapping[type[ChatserveError], str] = {
    QueueTimeout: "the request has waited {} for its turn, which is the limit; try again when the "
    "server is less busy, or raise --queue-timeout-s",
    FirstTokenTimeout: "no token has come in {}, which is the limit; send a shorter prompt, try "
    "again when the server is less busy, or raise --first-token-timeout-s",
    TokenGapTimeout: "no further token has come for {}, which is the limit; try again, or raise "
    "--token-gap-timeout-s",
    WorkerStalled: "the engine has made no step for {}, which is the limit; try again, or raise "
    "--token-gap-timeout-s",
    RequestTimeout: "the answer has taken {}, which is the limit; ask for fewer max_tokens, or "
    "raise --request-timeout-s",
}


def first_deadline(
    limits: TimeLimits, stream: Timed, phase: Phase, engine_moved_at: float
) -> Deadline:
    """The limit that `stream` meets first if nothing changes.

    `engine_moved_at`: of its last step, or now if it has nothing to do. Who waits, for others or
    for a slow reader, does not speak, which is no fault: then only the engine's own gap counts.
    """
    deadlines = [_after(stream.arrived_at, limits.request_timeout_s, RequestTimeout)]
    gap_s = limits.token_gap_timeout_s
    if stream.spoke_at is None:
        first_s = limits.first_token_timeout_s
        deadlines.append(_after(stream.arrived_at, first_s, FirstTokenTimeout))
        if phase == "waiting":
            deadlines.append(_after(stream.arrived_at, limits.queue_timeout_s, QueueTimeout))
    if stream.spoke_at is not None and phase == "decode":
        moved_at = max(engine_moved_at, stream.spoke_at)
        deadlines.append(_after(moved_at, gap_s, TokenGapTimeout))
        # the engine goes on without it; one that has waited may have been silent for as long
        deadlines.append(_after(stream.spoke_at, 2 * gap_s, TokenGapTimeout))
    else:
        # an engine that had nothing to do before was not late
        moved_at = max(engine_moved_at, stream.arrived_at)
        deadlines.append(_after(moved_at, gap_s, WorkerStalled))
    return min(deadlines, key=lambda each: each.due)


def _after(start: float, limit_s: float, kind: type[ChatserveError]) -> Deadline:
    return Deadline(start + limit_s if limit_s else math.inf, kind, limit_s)


class Watchdog:
    """Ends the streams that are overdue.

    `first_deadline` tells a stream's; `expire` ends one. `streams` is looked at when the timer
    fires, and may change in between.
    """

    def __init__(
        self,
        limits: TimeLimits,
        streams: Mapping[str, TimedKind],
        first_deadline: Callable[[str, TimedKind], Deadline],
        expire: Callable[[str, ChatserveError], None],
    ) -> None:
        positive = [
            limit_s
            for limit_s in (
                limits.queue_timeout_s, limits.first_token_timeout_s,
                limits.token_gap_timeout_s, limits.request_timeout_s,
            )
            if limit_s
        ]  # fmt: skip
        self._shortest_s = min(positive, default=math.inf)
        self._streams = streams
        self._first_deadline = first_deadline
        self._expire = expire
        self._overdue: dict[str, float] = {}
        """When what was found overdue is ended."""
        self._timer: asyncio.TimerHandle | None = None
        self._looks_at = math.inf

    def expect(self) -> None:
        """A stream has just come: look before it can be overdue."""
        self._look_at(time.monotonic() + self._shortest_s)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._looks_at = None, math.inf

    def _look_at(self, when: float) -> None:
        if when >= self._looks_at:
            return
        self.stop()
        self._looks_at = when
        delay_s = max(when - time.monotonic(), MIN_SLEEP_S)
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._look)

    def _look(self) -> None:
        self.stop()
        now = time.monotonic()
        soonest = math.inf
        before, self._overdue = self._overdue, {}
        for seq_id, stream in list(self._streams.items()):
            deadline = self._first_deadline(seq_id, stream)
            due = deadline.due
            if due <= now:
                due = before.get(seq_id, now + GRACE_S)
                if due <= now:
                    self._expire(seq_id, deadline.error())
                    continue
                self._overdue[seq_id] = due
            soonest = min(soonest, due)
        self._look_at(soonest)
