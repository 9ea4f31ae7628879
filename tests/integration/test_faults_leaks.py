"""Thousands of mixed requests: nothing of them stays behind in controller or worker."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

from tests.faults.client import LoadClient
from tests.faults.house import house
from tests.faults.invariants import check, outcome
from tests.faults.leaks import KEPT_S, Gauge, Growth, begin, slope
from tests.faults.planted import PLANTED
from tests.faults.traffic import Traffic

AT_ONCE = 16


def run(
    folder: Path, *, warm_up: int, requests: int, looks: int = 10, rest_s: float = 30.0,
    kept_s: float = KEPT_S,
    **environment: str,
) -> tuple[dict[str, Growth], Counter[str], list[str]]:  # fmt: skip
    """Growth of both processes, what became of the requests, and what is wrong with them."""
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    with house(folder) as rig:
        controller = rig.start_controller()
        worker = rig.start_worker(**environment)
        rig.wait_for_workers(1)
        traffic = Traffic(43)

        def send(number: int, at_once: int) -> None:
            client = LoadClient(rig.port)
            asyncio.run(client.send_all(traffic.take(number), at_once=at_once))
            outcomes.update(map(outcome, client.records))
            wrong.extend(check(client.records))

        send(warm_up, 2 * AT_ONCE)
        gauges = {"controller": Gauge(controller), "worker": Gauge(worker)}
        begin(gauges.values(), kept_s=kept_s)
        for i in range(looks):
            send(requests // looks, AT_ONCE)
            for gauge in gauges.values():
                gauge.note((i + 1) * requests // looks)
        growths = {
            name: gauge.growth(rest_s=rest_s) for name, gauge in gauges.items()
        }  # fmt: skip
    return growths, outcomes, wrong


def test_five_thousand_requests_leave_nothing_behind(tmp_path: Path) -> None:
    started = time.perf_counter()
    growths, outcomes, wrong = run(tmp_path, warm_up=1000, requests=4000)
    print(f"{growths} {dict(outcomes)} {time.perf_counter() - started:.1f} s")
    assert not wrong, wrong[:5]
    assert sum(outcomes.values()) == 5000
    assert not [status for status in outcomes if status.startswith("5")]
    # neither is everything cancelled, nor nothing
    assert outcomes["cancelled"] > 500 and outcomes["400"] > 100 and outcomes["done"] > 1500
    assert {name: growth.faults() for name, growth in growths.items()} == {
        "controller": [], "worker": [],
    }  # fmt: skip


def test_teeth_what_stays_and_what_blocks_is_found(tmp_path: Path) -> None:
    growths, _, _ = run(
        tmp_path,
        warm_up=50,
        requests=300,
        looks=3,
        rest_s=0.0,
        kept_s=0.0,
        **{PLANTED: "leak,block"},
    )
    faults = " ".join(growths["worker"].faults())
    assert "bytes a request" in faults and "more files" in faults and "more tasks" in faults
    assert "the loop was late by" in faults


def test_a_slope_is_what_most_of_its_points_say() -> None:
    assert slope([(x, 1000 + 3 * x) for x in range(10)]) == 3
    jump = [(x, 5_000_000 * (x > 3)) for x in range(12)]
    assert slope(jump) < 1024 * 1024 and slope([(x, 7) for x in range(5)]) == 0
