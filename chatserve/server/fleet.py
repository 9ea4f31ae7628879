"""All that workers have counted, added up so that no number ever goes back, and how it moves.

A worker that starts anew takes the place of one that is gone, by a small number of its model, and
goes on counting where that one stopped. Pure book-keeping: knows no HTTP; its clock is handed in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from chatserve.meter import BOUNDS, HistogramName, quantile
from chatserve.protocol.measured import Key, Measured

MAX_PLACES = 256
"""That are remembered with nobody on them."""
RATE_S = 10.0
WINDOW_S = 300.0
_STEP_S = 15.0
HISTORY_STEP_S = 2.0
HISTORY_LEN = 150

Numbers = Mapping[Key, float]


@dataclass
class Place:
    """Of one worker after the other: the `model` it serves, and its `number` among those.

    `before`: what those before the present one have counted in all.
    """

    model: str
    number: int
    worker_id: str
    before: dict[Key, float] = field(default_factory=dict)
    now: Numbers = field(default_factory=dict)
    started_at: float = 0.0
    num_starts: int = 1
    looks: deque[tuple[float, Numbers]] = field(default_factory=deque)
    """Totals of the last minutes, for what is going on of late."""
    last_looks: deque[tuple[float, Numbers]] = field(default_factory=deque)
    """The same of the last seconds."""

    def total(self) -> dict[Key, float]:
        numbers = dict(self.before)
        for key, value in self.now.items():
            numbers[key] = numbers.get(key, 0) + value
        return numbers

    def take_over(self, worker_id: str) -> None:
        self.worker_id = worker_id
        self.num_starts += 1
        self._begin_anew()

    def hear(self, measured: Measured, at: float) -> None:
        numbers = measured.growing()
        is_new_life = self.started_at not in (0.0, measured.started_at)
        # never back, whatever a worker says
        if is_new_life or any(numbers.get(key, 0) < value for key, value in self.now.items()):
            self._begin_anew()
        self.started_at, self.now = measured.started_at, numbers
        total = self.total()
        self.last_looks.append((at, total))
        while len(self.last_looks) > 2 and self.last_looks[1][0] <= at - RATE_S:
            self.last_looks.popleft()
        if not self.looks or at - self.looks[-1][0] >= _STEP_S:
            self.looks.append((at, total))
        while len(self.looks) > 2 and self.looks[1][0] <= at - WINDOW_S:
            self.looks.popleft()

    def rate(self, name: str) -> float:
        """Of a counter, a second, over the last seconds."""
        if len(self.last_looks) < 2:
            return 0.0
        (first_at, first), (last_at, last) = self.last_looks[0], self.last_looks[-1]
        key = ("counter", name, 0)
        return max(0.0, last.get(key, 0) - first.get(key, 0)) / max(1e-3, last_at - first_at)

    def recent(self, name: HistogramName) -> list[float]:
        """Counts of a histogram's buckets in the last minutes; of all there are before that."""
        total, first = self.total(), self.looks[0][1] if len(self.looks) > 1 else {}
        keys = [("bucket", name, index) for index in range(len(BOUNDS[name]) + 1)]
        return [total.get(key, 0) - first.get(key, 0) for key in keys]

    def percentiles(self, name: HistogramName) -> dict[str, float | None]:
        return percentiles(name, self.recent(name))

    def _begin_anew(self) -> None:
        self.before, self.now, self.started_at = self.total(), {}, 0.0


def percentiles(name: HistogramName, counts: Sequence[float]) -> dict[str, float | None]:
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {key: quantile(BOUNDS[name], counts, share) for key, share in shares.items()}


class Fleet:
    """Every worker's place."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._places: dict[tuple[str, int], Place] = {}
        self._place_of: dict[str, Place] = {}
        self._history: deque[float] = deque(maxlen=HISTORY_LEN)
        self._history_at = clock()

    def hear(
        self, worker_id: str, model: str, measured: Measured | None, known: Collection[str]
    ) -> None:
        """What worker `worker_id` says; `known` are all that are there, itself perhaps not yet."""
        if measured is None:
            return
        place = self._place_of.get(worker_id)
        if place is None:
            place = self._find_place(worker_id, model, known)
        place.hear(measured, self._clock())

    def place(self, worker_id: str) -> Place | None:
        return self._place_of.get(worker_id)

    def places(self) -> list[Place]:
        """Also of workers that are gone: what they have counted stays."""
        return sorted(self._places.values(), key=lambda place: (place.model, place.number))

    def tokens_per_s(self, known: Collection[str]) -> float:
        return sum(
            place.rate("generation_tokens")
            for worker_id, place in self._place_of.items()
            if worker_id in known
        )

    def history(self, known: Collection[str]) -> list[float]:
        """Tokens a second of all workers, each `HISTORY_STEP_S`, the latest last."""
        now = self._clock()
        num_steps = int((now - self._history_at) / HISTORY_STEP_S)
        if num_steps:
            rate = round(self.tokens_per_s(known), 2)
            self._history.extend([rate] * min(num_steps, HISTORY_LEN))
            self._history_at += num_steps * HISTORY_STEP_S
        return list(self._history)

    def _find_place(self, worker_id: str, model: str, known: Collection[str]) -> Place:
        gone = [each for each in self._place_of if each not in known]
        for each in gone:
            del self._place_of[each]
        taken = {(place.model, place.number) for place in self._place_of.values()}
        number = next(n for n in range(len(taken) + 1) if (model, n) not in taken)
        place = self._places.pop((model, number), None)
        if place is None:
            place = Place(model, number, worker_id)
        else:
            place.take_over(worker_id)
        self._places[model, number] = place  # the latest is last
        self._place_of[worker_id] = place
        free = [key for key in self._places if key not in taken | {(model, number)}]
        for key in free[:-MAX_PLACES]:
            del self._places[key]
        return place
