"""Templates that would take all time and memory: 400, and the streams beside them go on."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from chatserve.config import WorkerConfig
from chatserve.engine import serving as serving_module
from chatserve.errors import ModelLoadError
from chatserve.models.templates.render_process import RenderProcess
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.model_slot import ModelSlot
from chatserve.server.preparation_pool import PreparationPool
from chatserve.server.worker import create_slot_app, create_worker_app
from chatserve.server.worker_process import load_engine
from tests import tiny
from tests.fakes import FakeEngine, FakeModel, FakePrompts
from tests.faults.loop_lag import watching
from tests.hostile_templates import ALL_BOMBS, BOMBS, CHOSEN_BOMB, DOUBLING, ENDLESS
from tests.servers import RunningServer, serving
from tests.template_bombs import render

SAMPLE = [*BOMBS[::5], *DOUBLING[::4], ENDLESS[0]]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
MAX_BYTES = 256 << 20


class Bombs(FakePrompts):
    """Renders the template whose number the user says."""

    def chat(self, messages: Sequence[Any], **options: Any) -> list[int]:
        if messages[-1].content.isdigit():
            render(ALL_BOMBS[int(messages[-1].content)])
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
            reply = ask(server, str(ALL_BOMBS.index(source)))
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
        assert ask(server, str(ALL_BOMBS.index(ENDLESS[0]))).status_code == 400
        server.call(asyncio.sleep(0.02))


def measured(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.template_bombs", *arguments],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    figures: dict[str, Any] = json.loads(done.stdout)
    print(figures)
    return figures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that brings a template with all bombs."""
    tiny.save_model(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    config["chat_template"] = CHOSEN_BOMB
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return tmp_path


def config_of(folder: Path) -> WorkerConfig:
    return WorkerConfig(
        weights=str(folder), device="cpu", model_names=("fake",), dtype="float32",
        max_num_seqs=2, max_num_batched_tokens=64, prepare_grammars=False,
    )  # fmt: skip


def test_a_worker_has_its_model_s_template_rendered_by_another_process(folder: Path) -> None:
    engine, model = load_engine(config_of(folder), lambda _loaded, _total: None)
    assert isinstance(model.renderer, RenderProcess) and model.renderer.pid is not None
    process = psutil.Process(model.renderer.pid)
    slot = ModelSlot.filled(engine, model)

    def build() -> Edge:
        engine.start()
        return create_slot_app(slot)

    with serving(build) as server, watching(server.loop) as probe:
        before = process.cpu_times().user
        for source in (BOMBS[0], DOUBLING[0], ENDLESS[0]):
            reply = ask(server, str(ALL_BOMBS.index(source)))
            assert reply.status_code == 400, reply.text
            assert "the model's own chat template" in reply.json()["error"]["message"]
        assert process.cpu_times().user > before + 0.5
        process.kill()
        assert ask(server, "hi").status_code == 200
        assert model.renderer.pid not in (None, process.pid)
        print({"lag_s": probe._late and max(probe._late)})
        process = psutil.Process(model.renderer.pid)
        server.call(engine.stop())
        slot.close()
    assert not process.is_running()


def test_a_model_that_cannot_be_loaded_leaves_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(psutil.Process().children())
    started: list[set[psutil.Process]] = []

    def fail(*_: Any, **__: Any) -> None:
        started.append(set(psutil.Process().children()) - before)
        raise ModelLoadError("damaged")

    monkeypatch.setattr(serving_module, "load_model", fail)
    with pytest.raises(ModelLoadError, match="damaged"):
        load_engine(config_of(folder), lambda _loaded, _total: None)
    assert [len(each) for each in started] == [1]
    assert set(psutil.Process().children()) == before


@LINUX
def test_each_bomb_is_refused_in_little_time_and_memory() -> None:
    figures = measured()
    assert figures["refused"] == figures["bombs"]
    assert figures["most_s"] < 10 and figures["grown"] < MAX_BYTES


@LINUX
def test_without_bounds_on_sizes_memory_is_taken() -> None:
    assert measured("OFF")["grown"] > MAX_BYTES
