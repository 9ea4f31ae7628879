"""Histograms and what is read out of them."""

from __future__ import annotations

import pytest

from chatserve.meter import BOUNDS, Histogram, Meter, quantile


def test_a_value_counts_below_the_first_bound_that_it_is_not_over() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    histogram.observe(0.25, 4)
    assert histogram.counts == [6, 2, 1]
    assert histogram.sum == pytest.approx(15.0)


def test_bounds_rise() -> None:
    for bounds in BOUNDS.values():
        assert list(bounds) == sorted(set(bounds)) and bounds[0] > 0


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ([0, 0, 0], 0.5, None),
        ([4, 0, 0], 0.5, 0.5),
        ([1, 1, 0], 0.5, 1.0),
        ([2, 2, 0], 0.75, 1.5),
        ([0, 0, 3], 0.5, 2.0),
    ],
)
def test_quantiles_lie_on_lines_between_bounds(
    counts: list[int], share: float, expected: float | None
) -> None:
    assert quantile((1.0, 2.0), counts, share) == expected


def test_only_whole_answers_have_a_latency() -> None:
    meter = Meter()
    for outcome in ("stop", "length", "abort", "error"):
        meter.note_end(outcome, 0.5)
    assert meter.outcomes == {"stop": 1, "length": 1, "abort": 1, "error": 1}
    assert sum(meter.histograms["e2e_latency"].counts) == 2
