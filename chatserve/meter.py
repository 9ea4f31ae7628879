"""What a worker counts and times: plain numbers, added up where they arise, read by heartbeats.

Knows no clock, no HTTP and no word of a prompt. A count only ever grows while its process lives.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

# upper bounds of buckets in seconds: vLLM's, and finer ones below them for small models
_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
_PER_TOKEN_S = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2,
    0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_WHOLE_S = (
    0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0,
    40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip

HistogramName = Literal[
    "time_to_first_token", "inter_token_latency", "time_per_output_token", "e2e_latency",
    "queue_time", "step_time",
]  # fmt: skip
BOUNDS: Mapping[HistogramName, Sequence[float]] = {
    "time_to_first_token": _FIRST_TOKEN_S,
    "inter_token_latency": _PER_TOKEN_S,
    "time_per_output_token": _PER_TOKEN_S,
    "e2e_latency": _WHOLE_S,
    "queue_time": _WHOLE_S,
    "step_time": _PER_TOKEN_S,
}
Outcome = Literal["stop", "length", "abort", "error"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class Histogram:
    """How many values have come below each bound, those over the last one, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


def quantile(bounds: Sequence[float], counts: Sequence[float], share: float) -> float | None:
    """The value that `share` of all are not over, by straight lines between bounds.

    None where there are no values; what is over the last bound counts as that bound.
    """
    rank = share * sum(counts)
    if rank <= 0:
        return None
    below = 0.0
    for index, count in enumerate(counts[: len(bounds)]):
        if count and below + count >= rank:
            low = bounds[index - 1] if index else 0.0
            return low + (bounds[index] - low) * (rank - below) / count
        below += count
    return bounds[-1]


class Meter:
    """Of one engine. One thread writes each number; whoever reads may be a token behind.

    A prompt counts once however many choices go on with it; `cached_tokens` of it came from the
    prefix cache.
    """

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.outcomes: dict[Outcome, int] = dict.fromkeys(OUTCOMES, 0)
        self.histograms = {name: Histogram(bounds) for name, bounds in BOUNDS.items()}
        self.first_token = self.histograms["time_to_first_token"]
        self.between_tokens = self.histograms["inter_token_latency"]
        self.queue = self.histograms["queue_time"]
        self.step = self.histograms["step_time"]

    def note_prompt(self, num_tokens: int, num_cached: int) -> None:
        self.prompt_tokens += num_tokens
        self.cached_tokens += num_cached

    def note_end(self, outcome: Outcome, seconds: float) -> None:
        """A sequence has ended, `seconds` after it came."""
        self.outcomes[outcome] += 1
        if outcome in ("stop", "length"):
            self.histograms["e2e_latency"].observe(seconds)

    def note_answer(self, num_tokens: int, seconds: float) -> None:
        """An answer of more than one token is complete, `seconds` after the first of them."""
        self.histograms["time_per_output_token"].observe(seconds / (num_tokens - 1))
