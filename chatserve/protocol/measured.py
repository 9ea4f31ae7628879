"""What a worker has measured, as its heartbeats carry it: counts since its start, and what is now.

Names and bounds are those of `chatserve.meter`: both ends ship together.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from chatserve.meter import BOUNDS, HistogramName, Outcome

METRICS_PATH = "/metrics"
STATUS_PATH = "/admin/status"
MAX_RECENT = 50
"""Errors that are remembered, of a worker and of a controller."""
MAX_CODES = 100

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Code = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
CounterName = Literal["prompt_tokens", "cached_tokens", "generation_tokens", "num_preempted"]
Key = tuple[str, str, int]
"""Of one number that only grows: its kind, its name, and its place in a histogram."""


class Told(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class HistogramCounts(Told):
    """Values below each bound and over the last one, not added up, and the sum of all."""

    counts: list[Count]
    sum: Amount


class RecentError(Told):
    """One kind of error, `at` which time it came last, in seconds since 1970, and how often.

    `message` is empty where it might quote a request.
    """

    at: Amount
    code: Code
    message: Annotated[str, Field(max_length=300)]
    count: Annotated[int, Field(ge=1)] = 1


class Measured(Told):
    """`started_at` tells one life of a worker from the next."""

    started_at: Amount
    counters: dict[CounterName, Count]
    outcomes: dict[Outcome, Count]
    errors: Annotated[dict[Code, Count], Field(max_length=MAX_CODES)]
    histograms: dict[HistogramName, HistogramCounts]
    num_kv_tokens: Count = 0
    rss_bytes: Count = 0
    device: Annotated[str, Field(pattern=r"^[a-z0-9:_-]{0,20}$")] = ""
    device_used_bytes: Count = 0
    device_total_bytes: Count = 0
    recent_errors: Annotated[list[RecentError], Field(max_length=MAX_RECENT)] = Field(
        default_factory=list
    )

    @model_validator(mode="after")
    def _has_all_buckets(self) -> Measured:
        for name, histogram in self.histograms.items():
            if len(histogram.counts) != len(BOUNDS[name]) + 1:
                raise ValueError(f"{name} needs {len(BOUNDS[name]) + 1} counts")
        return self

    def growing(self) -> dict[Key, float]:
        """All that only grows, each number under a key of its own."""
        numbers: dict[Key, float] = {("counter", n, 0): c for n, c in self.counters.items()}
        numbers |= {("outcome", name, 0): count for name, count in self.outcomes.items()}
        numbers |= {("error", code, 0): count for code, count in self.errors.items()}
        for name, histogram in self.histograms.items():
            numbers["sum", name, 0] = histogram.sum
            numbers |= {("bucket", name, i): count for i, count in enumerate(histogram.counts)}
        return numbers
