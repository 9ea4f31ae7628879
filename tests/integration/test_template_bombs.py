"""Templates that would take all time and memory: 400, and the streams beside them go on."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.preparation_pool import PreparationPool
from chatserve.server.worker import create_worker_app
from tests.fakes import FakeEngine, FakeModel, FakePrompts
from tests.faults.loop_lag import watching
from tests.hostile_templates import BOMBS, DOUBLING, ENDLESS
from tests.servers import RunningServer, serving
from tests.template_bombs import render

ALL = [*BOMBS, *DOUBLING, *ENDLESS]
SAMPLE = [*BOMBS[::5], *DOUBLING[::4], ENDLESS[0]]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
MAX_BYTES = 256 << 20


class Bombs(FakePrompts):
    """Renders the template whose number the user says."""

    def chat(self, messages: Sequence[Any], **options: Any) -> list[int]:
        if messages[-1].content.isdigit():
            render(ALL[int(messages[-1].content)])
        return super().chat(messages, **options)


class BombModel(FakeModel):
    @property
    def prompts(self) -> FakePrompts:
        return Bombs(self.context_length)


def build() -> Edge:
    return create_worker_app(FakeEngine(), BombModel(), policy=AccessPolicy.build("127.0.0.1"))


def ask(server: RunningServer, content: str) -> httpx.Response:
    body = {"model": "fake", "messages": [{"role": "user", "content": content}]}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)


def test_bombs_are_400_and_keep_no_loop_busy() -> None:
    seconds = []
    with serving(build) as server, watching(server.loop) as probe:
        for source in SAMPLE:
            start_s = time.monotonic()
            reply = ask(server, str(ALL.index(source)))
            seconds.append(time.monotonic() - start_s)
            assert reply.status_code == 400, (source, reply.text)
            assert reply.json()["error"]["param"] == "messages"
            assert "chat template cannot render this chat" in reply.json()["error"]["message"]
        assert ask(server, "hi").status_code == 200
        print(
            {
                "bombs": len(SAMPLE),
                "most_s": max(seconds),
                "lag_s": probe._late and max(probe._late),
            }
        )
    assert max(seconds) < 20


def test_rendered_on_the_loop_they_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teeth: the probe fails where the same work is not done in the pool."""

    async def run(self: PreparationPool, work: Any, *arguments: Any) -> Any:
        return work(*arguments)

    monkeypatch.setattr(PreparationPool, "run", run)
    with (
        serving(build) as server,
        pytest.raises(AssertionError, match="was blocked for"),
        watching(server.loop),
    ):
        assert ask(server, str(ALL.index(ENDLESS[0]))).status_code == 400
        server.call(asyncio.sleep(0.02))


def measured(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.template_bombs", *arguments],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    figures: dict[str, Any] = json.loads(done.stdout)
    print(figures)
    return figures


@LINUX
def test_each_bomb_is_refused_in_little_time_and_memory() -> None:
    figures = measured()
    assert figures["refused"] == figures["bombs"]
    assert figures["most_s"] < 10 and figures["grown"] < MAX_BYTES


@LINUX
def test_without_bounds_on_sizes_memory_is_taken() -> None:
    assert measured("OFF")["grown"] > MAX_BYTES
