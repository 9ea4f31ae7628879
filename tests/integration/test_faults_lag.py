"""The event loops stay prompt under 64 streams; what blocks one is found."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from benchmarks.loop_lag import measure
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.worker import create_worker_app
from tests.fakes import FakeEngine, FakeModel
from tests.faults.loop_lag import STALL_S, watching
from tests.servers import serving


def test_sixty_four_streams_keep_no_loop_busy() -> None:
    figures = measure(64, 1.0, is_strict=False)
    print(figures)
    for name, lag in figures["lag"].items():
        assert lag["count"] > 10 and lag["max_ms"] < 1000 * STALL_S, name


def build() -> Edge:
    return create_worker_app(FakeEngine(), FakeModel(), policy=AccessPolicy.build("127.0.0.1"))


def test_a_probe_in_a_server_of_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teeth: the same with and without a route that sleeps."""
    with serving(build) as server:
        with watching(server.loop):
            assert httpx.get(f"{server.url}/health/live").status_code == 200
        call = Edge.__call__

        async def slow(self: Edge, *arguments: object) -> None:
            time.sleep(STALL_S + 0.1)
            await call(self, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Edge, "__call__", slow)
        with (
            pytest.raises(AssertionError, match="was blocked for 0"),
            watching(server.loop) as probe,
        ):
            server.call(asyncio.sleep(0.02))
            httpx.get(f"{server.url}/health/live")
            server.call(asyncio.sleep(0.02))
        assert probe.take().seconds == ()
