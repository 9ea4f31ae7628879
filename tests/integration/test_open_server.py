"""Without keys all clients are alike, whatever they send: a worker alone, behind a controller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy
from chatserve.server.registry import WorkerRegistry
from chatserve.server.response_store import ResponseStore
from chatserve.server.worker import create_worker_app
from tests.fakes import FakeClock, FakeEngine, FakeModel
from tests.servers import RunningServer, serving

TOKEN = "control-token"
SENT: tuple[dict[str, str], ...] = (
    {}, {"Authorization": "Bearer a"}, {"Authorization": "Bearer b"}, {"x-api-key": "c"},
    {"Authorization": f"Bearer {TOKEN}", "X-Chatserve-Cache-Salt": "0f" * 32},
)  # fmt: skip


@contextmanager
def front(kind: str, engine: FakeEngine, path: Path) -> Iterator[RunningServer]:
    store = ResponseStore(path)
    with ExitStack() as stack:
        if kind == "worker":
            yield stack.enter_context(
                serving(lambda: create_worker_app(engine, FakeModel(), response_store=store))
            )
            return
        keyed = AccessPolicy.build("127.0.0.1", api_keys=[TOKEN])
        worker = stack.enter_context(
            serving(
                lambda: create_worker_app(engine, FakeModel(), policy=keyed, control_token=TOKEN)
            )
        )
        registry = WorkerRegistry(FakeClock())
        server = stack.enter_context(
            serving(
                lambda: create_controller_app(registry, control_token=TOKEN, response_store=store)
            )
        )
        cards = [ModelCard(name="fake", created=1)]
        registry.register("w", worker.url, WorkerStatus(state="ready", models=cards))
        yield server


@pytest.mark.parametrize("kind", ["worker", "controller"])
def test_head_is_get_without_its_body(kind: str, tmp_path: Path) -> None:
    with (
        front(kind, FakeEngine(step_s=0), tmp_path / "r.db") as server,
        httpx.Client(base_url=server.url) as client,
    ):
        for path, status in {"/v1/models": 200, "/health/live": 200, "/v1/embeddings": 405}.items():
            told, whole = client.head(path), client.get(path)
            assert told.status_code == whole.status_code == status, path
            assert told.content == b"" != whole.content
            assert told.headers["content-length"] == whole.headers["content-length"]


@pytest.mark.parametrize("kind", ["worker", "controller"])
def test_a_key_that_nobody_asked_for_changes_nothing(kind: str, tmp_path: Path) -> None:
    engine = FakeEngine(step_s=0)
    with (
        front(kind, engine, tmp_path / "r.db") as server,
        httpx.Client(base_url=server.url) as client,
    ):

        def create(headers: dict[str, str], **fields: Any) -> Any:
            body = {"model": "fake", "input": "hi", **fields}
            answer = client.post("/v1/responses", json=body, headers=headers)
            assert answer.status_code == 200, answer.text
            return answer.json()["id"]

        first = create(SENT[1])
        for headers in SENT:
            create(headers, previous_response_id=first)
            assert client.get(f"/v1/responses/{first}", headers=headers).status_code == 200
    assert {each.salt for each in engine.submitted} == {b""}
    assert len(engine.submitted) == 1 + len(SENT)
