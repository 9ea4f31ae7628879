"""Counts of workers that come and go: never back, and few labels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from chatserve.meter import BOUNDS
from chatserve.protocol.control import ModelCard, WorkerStatus, parse
from chatserve.protocol.measured import HistogramCounts, Measured
from chatserve.server import fleet as module
from chatserve.server.fleet import Fleet, Place
from tests.fakes import FakeClock

TOKENS = ("counter", "generation_tokens", 0)


def measured(tokens: int, *, started_at: float = 1.0, **more: Any) -> Measured:
    return Measured(
        started_at=started_at, counters={"generation_tokens": tokens}, outcomes={"stop": tokens},
        errors={}, histograms={}, **more,
    )  # fmt: skip


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def fleet(clock: FakeClock) -> Fleet:
    return Fleet(clock)


def total(fleet: Fleet) -> float:
    return sum(place.total().get(TOKENS, 0) for place in fleet.places())


def place_of(fleet: Fleet, worker_id: str) -> Place:
    place = fleet.place(worker_id)
    assert place is not None
    return place


def test_a_worker_that_starts_anew_goes_on_counting(fleet: Fleet) -> None:
    fleet.hear("a", "m", measured(10), [])
    fleet.hear("b", "m", measured(3, started_at=2.0), [])
    assert total(fleet) == 13
    [place] = fleet.places()
    assert (place.model, place.number, place.worker_id, place.num_starts) == ("m", 0, "b", 2)


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (measured(3), 13),  # fewer: it must have begun anew
        (measured(12, started_at=2.0), 22),  # more, but of another life
        (measured(12), 12),
    ],
)
def test_a_worker_with_an_id_of_its_own_that_starts_anew(
    fleet: Fleet, second: Measured, expected: int
) -> None:
    fleet.hear("a", "m", measured(10), [])
    fleet.hear("a", "m", second, ["a"])
    assert total(fleet) == expected


def test_counts_never_go_back_whatever_workers_say(fleet: Fleet) -> None:
    seen = 0.0
    for number, tokens in enumerate((5, 2, 9, 0, 4, 4, 1)):
        fleet.hear("ab"[number % 2], "m", measured(tokens, started_at=number % 3), ["a", "b"])
        assert total(fleet) >= seen
        seen = total(fleet)


def test_two_at_once_have_places_of_their_own(fleet: Fleet) -> None:
    for worker_id in ("a", "b"):
        fleet.hear(worker_id, "m", measured(1), ["a"])
    fleet.hear("c", "n", measured(1), ["a", "b"])
    assert [(place.model, place.number) for place in fleet.places()] == [
        ("m", 0), ("m", 1), ("n", 0)
    ]  # fmt: skip
    # the first is gone: who comes takes its place, not a new one
    fleet.hear("d", "m", measured(1), ["b", "c"])
    assert place_of(fleet, "d").number == 0 and len(fleet.places()) == 3


def test_a_worker_without_numbers_has_no_place(fleet: Fleet) -> None:
    fleet.hear("a", "m", None, [])
    assert fleet.place("a") is None and not fleet.places()


def test_places_of_models_that_are_gone_are_bounded(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PLACES", 3)
    for number in range(20):
        fleet.hear(f"w{number}", f"m{number}", measured(1), [])
    assert [place.model for place in fleet.places()] == ["m16", "m17", "m18", "m19"]


def test_rates_are_those_of_the_last_seconds(fleet: Fleet, clock: FakeClock) -> None:
    tokens = itertools.count(0, 100)
    for _ in range(30):
        fleet.hear("a", "m", measured(next(tokens)), ["a"])
        clock.advance(2)
    assert place_of(fleet, "a").rate("generation_tokens") == pytest.approx(50)
    assert fleet.tokens_per_s(["a"]) == pytest.approx(50)
    assert fleet.tokens_per_s([]) == 0  # it is gone
    for _ in range(8):
        fleet.hear("a", "m", measured(2900), ["a"])
        clock.advance(2)
    assert place_of(fleet, "a").rate("generation_tokens") == 0


def test_the_history_has_a_value_for_each_step(fleet: Fleet, clock: FakeClock) -> None:
    assert fleet.history([]) == []
    clock.advance(2)
    assert fleet.history([]) == fleet.history([]) == [0]
    clock.advance(10_000)
    assert len(fleet.history([])) == module.HISTORY_LEN


def test_percentiles_are_those_of_the_last_minutes(fleet: Fleet, clock: FakeClock) -> None:
    def with_latency(slow: int, fast: int) -> Measured:
        counts = [0] * (len(BOUNDS["inter_token_latency"]) + 1)
        counts[-2], counts[0] = slow, fast
        histogram = HistogramCounts(counts=counts, sum=1.0)
        return measured(slow + fast).model_copy(
            update={"histograms": {"inter_token_latency": histogram}}
        )

    fleet.hear("a", "m", with_latency(100, 0), ["a"])
    place = place_of(fleet, "a")
    assert place.percentiles("inter_token_latency")["p50"] == pytest.approx(60)
    for step in range(40):
        clock.advance(15)
        fleet.hear("a", "m", with_latency(100, step), ["a"])
    found = place.percentiles("inter_token_latency")["p99"]
    assert found is not None and found <= 0.001
    assert len(place.looks) < 25


def test_a_heartbeat_carries_them_and_is_checked() -> None:
    status = WorkerStatus(
        state="ready", models=[ModelCard(name="m", created=1)], metrics=measured(3)
    )
    assert parse(WorkerStatus, status.to_json()) == status
    assert len(status.to_json()) < 2000
    with pytest.raises(ValueError, match="needs"):
        Measured(
            started_at=1.0, counters={}, outcomes={}, errors={},
            histograms={"step_time": HistogramCounts(counts=[1], sum=0.0)},
        )  # fmt: skip
