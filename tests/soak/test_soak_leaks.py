"""Tens of thousands of requests, and thousands to a model: memory does not grow."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import tiny
from tests.faults.client import LoadClient, Request
from tests.faults.house import Process
from tests.faults.invariants import check, outcome
from tests.integration.test_faults_leaks import run

pytestmark = pytest.mark.soak
MIB = 1024 * 1024


@pytest.mark.timeout(1200)
def test_fifty_thousand_requests_take_less_than_20_mib(tmp_path: Path) -> None:
    started = time.perf_counter()
    growths, outcomes, wrong = run(tmp_path, warm_up=1000, requests=49_000, looks=49)
    print(f"{growths} {dict(outcomes)} {time.perf_counter() - started:.0f} s")
    assert not wrong, wrong[:5]
    assert not [status for status in outcomes if status.startswith("5")]
    for name, growth in growths.items():
        assert growth.rss_bytes < 20 * MIB and not growth.faults(), name


@pytest.mark.timeout(1200)
def test_two_thousand_requests_to_a_model_take_less_than_30_mib(tmp_path: Path) -> None:
    """`chatserve serve` with a tiny network: engine, cache, templates and grammars included."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    tiny.save_model(folder)
    with ExitStack() as stack:
        # in half precision oneDNN keeps up to 1,024 compiled products, one for each shape: 100 MiB
        command = ["chatserve.server", "--port=0", "--dtype=float32", str(folder)]
        process = Process("serve", command, tmp_path)
        stack.callback(process.end)
        port = process.wait_for_port()
        (worker,) = process.children()
        sizes: dict[str, list[int]] = {"controller": [], "worker": []}
        for number in (500, 500, 500, 500, 500):
            client = LoadClient(port)
            asyncio.run(client.send_all(map(request, range(number)), at_once=8))
            assert check(client.records) == []
            assert {outcome(record) for record in client.records} <= {"done", "200", "cancelled"}
            for name, pid in (("controller", process.pid), ("worker", worker)):
                sizes[name].append(psutil.Process(pid).memory_info().rss)
    print({name: [size // 1024 for size in each] for name, each in sizes.items()})
    for name, each in sizes.items():
        assert each[-1] - each[0] < 30 * MIB, name


def request(number: int) -> Request:
    """Streams and whole answers of all kinds, some left, one in ten with a grammar."""
    body: dict[str, Any] = {
        "model": "tiny", "stream": number % 3 > 0, "max_tokens": 4 + number % 13,
        "messages": [{"role": "user", "content": f"say {number}"}], "ignore_eos": True,
        "temperature": number % 2, "seed": number,
    }  # fmt: skip
    if number % 10 == 0:
        body |= {"ignore_eos": False, "structured_outputs": {"choice": [f"{number}", "no"]}}
    return Request(body, cancel_after=number % 7 if number % 5 == 0 else None)
