"""What grows while requests come and go: memory by its slope, the rest by its count at rest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from tests.faults.house import Process
from tests.faults.loop_lag import STALL_S
from tests.faults.window import View, look, look_until

MAX_SLOPE_BYTES = 1024
MAX_OBJECTS = 1000  # caches that fill up may take some
REST_S = 30.0
KEPT_S = 4.5


@dataclass(frozen=True)
class Growth:
    """Of one process over a run: bytes a request, what more it holds at rest, its loop's lag."""

    slope_bytes: float
    rss_bytes: int
    num_fds: int
    num_threads: int
    num_tasks: int
    num_objects: int
    max_lag_ms: float

    def faults(self, max_slope_bytes: float = MAX_SLOPE_BYTES) -> list[str]:
        found = []
        if self.slope_bytes >= max_slope_bytes:
            found.append(f"memory grows by {self.slope_bytes:.0f} bytes a request")
        counts = {"files": self.num_fds, "threads": self.num_threads, "tasks": self.num_tasks}
        found += [f"{number} more {what}" for what, number in counts.items() if number > 0]
        if self.num_objects > MAX_OBJECTS:
            found.append(f"{self.num_objects} more objects")
        if self.max_lag_ms > 1000 * STALL_S:
            found.append(f"the loop was late by {self.max_lag_ms:.0f} ms")
        return found


class Gauge:
    """Looks into one process again and again, after so many requests each time."""

    def __init__(self, process: Process, pid: int | None = None) -> None:
        self._folder = process.folder
        self._pid = pid or process.pid
        self._memory: list[tuple[int, int]] = []
        self._first: View | None = None
        self._max_lag_ms = 0.0

    def begin(self) -> None:
        """What is there when it holds the least, in this and later calls, is what the end is
        compared with."""
        view = look_until(self._folder, self._pid, lambda view: view.is_calm, "it is not calm")
        if self._first is None or view.num_fds <= self._first.num_fds:
            self._first = view

    def note(self, num_requests: int) -> None:
        """Memory, now, and how late the loop was since the last look."""
        view = look(self._folder, self._pid)
        self._memory.append((num_requests, view.rss_bytes))
        self._max_lag_ms = max(self._max_lag_ms, view.lag["max_ms"])

    def growth(self, *, rest_s: float = REST_S) -> Growth:
        """Once it holds no more than at first, or does not come to that in `rest_s`."""
        first, deadline = self._first, time.monotonic() + rest_s
        assert first is not None, "it has not begun"
        while True:
            last = look(self._folder, self._pid)
            growth = Growth(
                0.0,
                last.rss_bytes - first.rss_bytes,
                last.num_fds - first.num_fds,
                last.num_threads - first.num_threads,
                last.num_tasks - first.num_tasks,
                last.num_objects - first.num_objects,
                self._max_lag_ms,
            )
            if (last.is_calm and not growth.faults()) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return replace(growth, slope_bytes=slope(self._memory))


def begin(gauges: Iterable[Gauge], *, kept_s: float = KEPT_S) -> None:
    """Connections that are kept for the next request have gone after `kept_s`."""
    deadline = time.monotonic() + kept_s
    while True:
        for gauge in gauges:
            gauge.begin()
        if time.monotonic() > deadline:
            return
        time.sleep(0.2)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line through the points, by the median of all pairs: one jump does not decide."""
    return statistics.median(
        (y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2)
    )
