"""Counts over the death of a worker, with real processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.faults.house import Process

WAIT_S = 60.0


@pytest.fixture
def url(tmp_path: Path) -> Iterator[tuple[str, Process]]:
    process = Process(
        "serve", ["tests.serve_fake", "--port=0", "--heartbeat-interval-s=0.1", "ok"], tmp_path,
        QUICK_RESTARTS="1",
    )  # fmt: skip
    yield f"http://127.0.0.1:{process.wait_for_port()}", process
    process.end()


def metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics").raise_for_status().text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_no_count_goes_back_when_a_worker_is_killed(url: tuple[str, Process]) -> None:
    address, process = url
    tokens = "chatserve_generation_tokens_total"
    body = {"model": "ok", "messages": [{"role": "user", "content": "hi"}]}

    def ask() -> None:
        httpx.post(f"{address}/v1/chat/completions", json=body, timeout=WAIT_S).raise_for_status()

    ask()
    wait_until(lambda: metric(address, tokens) == 5)
    [worker] = process.children()
    psutil.Process(worker).kill()
    wait_until(lambda: metric(address, "chatserve_worker_starts_total") == 2)
    assert metric(address, tokens) == 5
    ask()
    wait_until(lambda: metric(address, tokens) == 10)
    status = httpx.get(f"{address}/admin/status").json()
    assert [each["number"] for each in status["workers"]] == [0]
