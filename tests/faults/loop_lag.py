"""How late an event loop runs: the time between when a timer was due and when it was called.

What the kernel took from the process for others does not count where the kernel tells it (Linux): a
busy machine makes every loop late, only a blocked one is at fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

INTERVAL_S = 0.01
MAX_KEPT = 100_000
STALL_S = 0.25
"""A test fails over this; what is wanted of a quiet machine is 0.1 s."""


@dataclass(frozen=True)
class Lag:
    """Of the timers since the last look: how late they were, sorted."""

    seconds: tuple[float, ...]

    @property
    def most(self) -> float:
        return self.seconds[-1] if self.seconds else 0.0

    def percentile(self, percent: float) -> float:
        last = len(self.seconds) - 1
        return self.seconds[round(last * percent / 100)] if self.seconds else 0.0

    def to_dict(self) -> dict[str, float]:
        return {
            "count": len(self.seconds),
            "p50_ms": round(1e3 * self.percentile(50), 2),
            "p99_ms": round(1e3 * self.percentile(99), 2),
            "max_ms": round(1e3 * self.most, 2),
        }


class LagProbe:
    """Runs on one loop from `start` on; `take` may be called from any thread.

    `is_strict`: waiting for a processor counts, too.
    """

    def __init__(self, *, is_strict: bool = False) -> None:
        self._late: list[float] = []
        self._is_strict = is_strict
        self._handle: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Call it on the loop."""
        self._loop = loop
        self._queued_s = Queued(threading.get_native_id())
        self._before_s = self._queued_s()
        self._wind()

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def take(self) -> Lag:
        """What was noted since the last call."""
        late, self._late = self._late, []
        return Lag(tuple(sorted(late)))

    def _note(self) -> None:
        now, queued_s = time.monotonic(), self._queued_s()
        late_s = now - self._due
        if not self._is_strict:
            late_s -= queued_s - self._before_s
        if len(self._late) < MAX_KEPT:
            self._late.append(max(0.0, late_s))
        # what this very call took is not late
        self._before_s = queued_s
        self._wind()

    def _wind(self) -> None:
        self._due = time.monotonic() + INTERVAL_S
        self._handle = self._loop.call_later(INTERVAL_S, self._note)


class Queued:
    """Seconds that a thread of this process was ready to run and had no processor."""

    def __init__(self, thread_id: int) -> None:
        path = Path(f"/proc/self/task/{thread_id}/schedstat")
        self._file = os.open(path, os.O_RDONLY) if path.exists() else None

    def __call__(self) -> float:
        if self._file is None:
            return 0.0
        return int(os.pread(self._file, 100, 0).split()[1]) / 1e9

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[LagProbe]:
    """This loop, while the block runs; fails when something blocked it."""
    probe = LagProbe()
    probe.start(asyncio.get_running_loop())
    try:
        yield probe
    finally:
        probe.stop()
    assert_prompt(probe.take())


@contextlib.contextmanager
def watching(loop: asyncio.AbstractEventLoop) -> Iterator[LagProbe]:
    """The same of a loop in another thread, as that of a `RunningServer`."""
    probe = LagProbe()
    loop.call_soon_threadsafe(probe.start, loop)
    try:
        yield probe
    finally:
        loop.call_soon_threadsafe(probe.stop)
    assert_prompt(probe.take())


def assert_prompt(lag: Lag) -> None:
    num_late = len(lag.seconds) - bisect_left(lag.seconds, 0.1)
    assert lag.most < STALL_S, (
        f"the event loop was blocked for {lag.most:.3f} s, and {num_late} times for over 0.1 s"
    )
