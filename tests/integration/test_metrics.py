"""`/metrics` and `/admin/status`, of a worker that is alone and of a controller."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_text

from chatserve.errors import GenerationFailed
from chatserve.meter import BOUNDS
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.protocol.measured import HistogramCounts, Measured, RecentError
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy
from chatserve.server.metrics_text import COUNTERS, HISTOGRAMS, PREFIX
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_worker_app
from tests.asgi import Answer, RunningApp, running
from tests.fakes import FakeClock, FakeEngine, FakeModel

KEY, CANARY = "sk-CANARY-KEY-71", "CANARY-PROMPT-4410"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(num_cached=2)


@pytest.fixture
def lone(engine: FakeEngine) -> Iterator[RunningApp]:
    policy = AccessPolicy.build("127.0.0.1", api_keys=[KEY])
    with running(create_worker_app(engine, FakeModel(), policy=policy)) as app:
        yield app


def get(app: RunningApp, path: str, *headers: tuple[str, str]) -> Answer:
    return app.request("GET", path, headers=[("authorization", f"Bearer {KEY}"), *headers])


def ask(app: RunningApp, model: str = "fake") -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": CANARY}]}
    headers = [("authorization", f"Bearer {KEY}"), ("content-type", "application/json")]
    return app.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers=headers)


def samples(answer: Answer, name: str) -> dict[str, float]:
    """Of one name, by their labels."""
    return {
        ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in parse_text(answer.body.decode())
        for sample in family.samples
        if sample.name == PREFIX + name
    }


def overview(app: RunningApp) -> dict[str, Any]:
    answer = get(app, "/admin/status")
    assert answer.status == 200
    found: dict[str, Any] = json.loads(answer.body)
    return found


def let_it_look(app: RunningApp) -> None:
    """Once more what a lone worker looks at every two seconds."""
    operator = next(
        route.endpoint.__self__ for route in app._app.app.routes if route.path == "/metrics"
    )
    operator._listen()


def test_both_want_a_key_where_there_are_any(lone: RunningApp) -> None:
    for path in ("/metrics", "/admin/status"):
        assert lone.request("GET", path, headers=()).status == 401
        assert get(lone, path).status == 200


@pytest.mark.parametrize(
    ("accept", "parse", "media_type"),
    [("", parse_text, "text/plain"), (OPEN_METRICS, parse_open, "application/openmetrics-text")],
)
def test_prometheus_can_read_it(lone: RunningApp, accept: str, parse: Any, media_type: str) -> None:
    assert ask(lone).status == 200
    let_it_look(lone)
    answer = get(lone, "/metrics", ("accept", accept))
    assert answer.headers["content-type"].startswith(media_type)
    families = {family.name: family for family in parse(answer.body.decode())}
    for shown, _ in HISTOGRAMS.values():
        assert families[PREFIX + shown].type == "histogram"
        labels = [s.labels for s in families[PREFIX + shown].samples if s.name.endswith("_bucket")]
        assert labels[-1] == {"model": "fake", "worker": "0", "le": "+Inf"}
    for shown, _ in COUNTERS.values():
        assert families[PREFIX + shown].type == "counter"
    assert families[PREFIX + "kv_cache_usage_ratio"].type == "gauge"


def test_an_answer_shows_in_the_numbers(lone: RunningApp) -> None:
    assert ask(lone).status == 200
    let_it_look(lone)
    answer = get(lone, "/metrics")
    own = "model=fake,worker=0"
    assert samples(answer, "generation_tokens_total") == {own: 5}
    assert samples(answer, "prompt_tokens_cached_total") == {own: 2}
    assert samples(answer, "request_success_total")[f"finished_reason=stop,{own}"] == 1
    assert samples(answer, "time_to_first_token_seconds_count") == {own: 1}
    assert samples(answer, "inter_token_latency_seconds_count") == {own: 4}
    assert samples(answer, "process_resident_memory_bytes")[own] > 1e7
    assert samples(answer, "device_memory_total_bytes")[own] > 1e8
    assert samples(answer, "worker_state")["model=fake,state=ready,worker=0"] == 1
    assert samples(answer, "http_responses_total") == {"status=200": 1}
    [worker] = overview(lone)["workers"]
    assert worker["ttft_s"]["p99"] > 0 and worker["state"] == "ready"
    assert (worker["kv_used_tokens"], worker["kv_total_tokens"]) == (0, 1000)


def test_what_clients_send_shows_nowhere(lone: RunningApp, engine: FakeEngine) -> None:
    engine.refusal = GenerationFailed("the engine failed on this request: ValueError")
    assert ask(lone).status == 500
    ask(lone, CANARY)
    get(lone, f"/v1/{CANARY}")
    lone.request("GET", "/v1/models", headers=[("authorization", f"Bearer {CANARY}")])
    let_it_look(lone)
    metrics, status = get(lone, "/metrics"), get(lone, "/admin/status")
    assert CANARY not in (metrics.body + status.body).decode()
    assert KEY not in (metrics.body + status.body).decode()
    told = samples(metrics, "request_errors_total")
    assert told["code=generation_failed,model=fake,worker=0"] >= 1
    assert told["code=not_found,model=fake,worker=0"] == 1
    assert told["code=invalid_api_key,model=fake,worker=0"] == 1
    errors = {each["code"]: each for each in json.loads(status.body)["errors"]}
    assert errors["generation_failed"]["message"].startswith("the engine failed")
    assert errors["invalid_api_key"]["message"] == ""


def test_an_operator_can_look_while_the_server_drains(lone: RunningApp) -> None:
    edge: Any = lone._app
    edge.drain(5)
    assert ask(lone).status == 503
    assert get(lone, "/metrics").status == 200
    assert overview(lone)["workers"]
    assert edge.num_in_flight == 0


def worker_status(tokens: int, **more: Any) -> WorkerStatus:
    counts = [tokens] + [0] * len(BOUNDS["time_to_first_token"])
    return WorkerStatus(
        state="ready", models=[ModelCard(name="m", created=1)], num_running=2, num_waiting=3,
        free_kv_tokens=25, wait_s=1.5,
        metrics=Measured(
            started_at=1.0, counters={"generation_tokens": tokens}, outcomes={"stop": tokens},
            errors={"worker_stalled": 1}, num_kv_tokens=100,
            histograms={"time_to_first_token": HistogramCounts(counts=counts, sum=1.0)},
            recent_errors=[RecentError(at=9.0, code="worker_stalled", message="no step for 30 s")],
        ),
        **more,
    )  # fmt: skip


def test_a_controller_has_all_workers_and_forgets_no_count() -> None:
    registry = WorkerRegistry(FakeClock(), expected=["m"])
    edge = create_controller_app(registry, control_token="token")
    with running(edge) as app:
        operator: Any = next(
            route.endpoint.__self__
            for route in edge.app.routes  # type: ignore[attr-defined]
            if getattr(route, "path", "") == "/metrics"
        )

        def hear(worker_id: str, status: WorkerStatus) -> None:
            registry.register(worker_id, f"http://127.0.0.1:{ord(worker_id)}", status)
            operator.hear(worker_id, status)

        hear("a", worker_status(7))
        hear("b", worker_status(1))
        answer = app.request("GET", "/metrics", headers=())
        assert samples(answer, "generation_tokens_total") == {
            "model=m,worker=0": 7, "model=m,worker=1": 1
        }  # fmt: skip
        assert samples(answer, "kv_cache_usage_ratio")["model=m,worker=0"] == 0.75
        found = json.loads(app.request("GET", "/admin/status", headers=()).body)
        assert [each["id"] for each in found["workers"]] == ["a", "b"]
        assert found["queue"] == {"running": 4, "waiting": 6, "wait_s": 1.5}
        assert found["models"][0]["name"] == "m"
        assert found["errors"][0] == {
            "time": 9.0, "code": "worker_stalled", "model": "m", "message": "no step for 30 s",
            "count": 1,
        }  # fmt: skip

        registry.remove("a")
        gone = app.request("GET", "/metrics", headers=())
        assert samples(gone, "generation_tokens_total")["model=m,worker=0"] == 7
        assert samples(gone, "worker_state")["model=m,state=gone,worker=0"] == 1
        assert samples(gone, "num_requests_running") == {"model=m,worker=1": 2}
        hear("c", worker_status(2))
        back = app.request("GET", "/metrics", headers=())
        assert samples(back, "generation_tokens_total") == {
            "model=m,worker=0": 9, "model=m,worker=1": 1
        }  # fmt: skip
        assert samples(back, "time_to_first_token_seconds_count")["model=m,worker=0"] == 9
        assert samples(back, "worker_starts_total")["model=m,worker=0"] == 2


def test_a_controller_counts_what_it_tells_by_itself() -> None:
    edge = create_controller_app(WorkerRegistry(FakeClock()), control_token="token")
    with running(edge) as app:
        assert app.post("/v1/chat/completions", {"model": CANARY, "messages": []}).status == 404
        app.request("GET", "/health/live", headers=())
        answer = app.request("GET", "/metrics", headers=())
        assert samples(answer, "server_errors_total") == {"code=model_not_found": 1}
        assert samples(answer, "http_responses_total") == {"status=404": 1}
        assert CANARY not in answer.body.decode()
