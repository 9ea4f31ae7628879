"""The Grafana dashboard and the page of metrics, against what `/metrics` says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from chatserve.meter import BOUNDS, HistogramName
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.protocol.measured import HistogramCounts, Measured
from chatserve.server.fleet import Place
from chatserve.server.metrics_text import Seen, metrics_text

OPERATIONS = Path(__file__).parents[3] / "docs" / "operations"
NAME = re.compile(r"chatserve_[a-z_0-9]+")
LABEL = re.compile(r"(?:by \(|, )([a-z_]+)(?=[,)])|\{\{([a-z_]+)\}\}|([a-z_]+)=~?\"")


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """Names of samples, with their labels."""
    names: list[HistogramName] = [*BOUNDS]
    metrics = Measured(
        started_at=1.0, counters={"prompt_tokens": 1}, outcomes={"stop": 1},
        errors={"worker_died": 1}, num_kv_tokens=9, device_total_bytes=9,
        histograms={
            name: HistogramCounts(counts=[1] * (len(BOUNDS[name]) + 1), sum=1.0) for name in names
        },
    )  # fmt: skip
    place = Place("m", 0, "w")
    place.hear(metrics, 1.0)
    status = WorkerStatus(state="ready", models=[ModelCard(name="m", created=1)], metrics=metrics)
    text, _ = metrics_text([Seen.of(place, "ready", status)], {"not_found": 1}, {404: 1})
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((OPERATIONS / "grafana-dashboard.json").read_text("utf-8"))
    return found


def queries() -> list[tuple[str, str]]:
    """Of each panel: what is asked, and how it is called."""
    return [
        (target["expr"], target["legendFormat"])
        for panel in dashboard()["panels"]
        for target in panel["targets"]
    ]


def test_the_dashboard_asks_for_what_there_is(labels: dict[str, set[str]]) -> None:
    for expression, legend in queries():
        names = NAME.findall(expression)
        assert names and set(names) <= set(labels), expression
        known = set().union(*(labels[name] for name in names))
        asked = {"".join(found) for found in LABEL.findall(expression + legend)}
        assert asked <= known, (expression, asked - known)


def test_the_dashboard_leaves_nothing_out(labels: dict[str, set[str]]) -> None:
    asked = {name for expression, _ in queries() for name in NAME.findall(expression)}
    told = {name for name in labels if not name.endswith(("_created", "_sum", "_count"))}
    assert told - asked == {"chatserve_build_info", "chatserve_kv_cache_tokens",
                            "chatserve_generation_tokens_per_second"}  # fmt: skip


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_the_page_has_a_row_for_each_metric(labels: dict[str, set[str]]) -> None:
    page = (OPERATIONS / "metrics.md").read_text("utf-8")
    table = page.partition("## What there is")[2].partition("\n## ")[0]
    rows = set(
        NAME.findall(
            table.replace("`…_waiting`", "`chatserve_num_requests_waiting`").replace(
                "`…_total_bytes`", "`chatserve_device_memory_total_bytes`"
            )
        )
    )
    told = {name.removesuffix("_bucket") for name in labels
            if not name.endswith(("_created", "_sum", "_count"))}  # fmt: skip
    assert rows == told
