"""Spans of requests: what they say, whose they are below, and that there are none unasked.

OpenTelemetry's API is there with FastAPI; a tracer of our own stands in for its SDK.
"""

from __future__ import annotations

import builtins
import itertools
import json
import logging
from collections.abc import Iterator
from contextvars import copy_context
from typing import Any

import pytest
from opentelemetry.trace import INVALID_SPAN_CONTEXT, SpanContext, TraceFlags, get_current_span

from chatserve.errors import GenerationFailed, UsageError
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.log_lines import JsonLines
from chatserve.server.outcome import begin, current_trace_headers, current_trace_id
from chatserve.server.tracing import Tracing, traced
from chatserve.server.worker import create_worker_app
from tests.asgi import Answer, running
from tests.fakes import FakeEngine, FakeModel
from tests.unit.test_layering import modules_after

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CANARY = "CANARY-PROMPT-9013"


class FakeSpan:
    def __init__(self, name: str, context: SpanContext, parent: SpanContext) -> None:
        self.name, self.context, self.parent = name, context, parent
        self.attributes: dict[str, Any] = {}
        self.status: Any = None
        self.has_ended = False

    def get_span_context(self) -> SpanContext:
        return self.context

    def set_attributes(self, attributes: dict[str, Any]) -> None:
        self.attributes |= attributes

    def set_status(self, status: Any) -> None:
        self.status = status

    def update_name(self, name: str) -> None:
        self.name = name

    def end(self) -> None:
        assert not self.has_ended
        self.has_ended = True


class FakeTracer:
    def __init__(self) -> None:
        self.spans: list[FakeSpan] = []
        self._ids = itertools.count(0x1234)

    def start_span(self, name: str, context: Any, kind: Any, attributes: Any) -> Any:
        parent = get_current_span(context).get_span_context()
        number = next(self._ids)
        trace_id = parent.trace_id if parent.is_valid else number << 64
        own = SpanContext(trace_id, number, is_remote=False, trace_flags=TraceFlags(1))
        span = FakeSpan(name, own, parent)
        span.attributes |= attributes
        self.spans.append(span)
        # the API asks for its own kind where a span is put into a context
        return span


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch) -> FakeTracer:
    from opentelemetry import trace
    from opentelemetry.trace import NonRecordingSpan

    put = trace.set_span_in_context
    monkeypatch.setattr(
        trace,
        "set_span_in_context",
        lambda span, *rest: put(NonRecordingSpan(span.get_span_context()), *rest),
    )
    return FakeTracer()


def worker(tracer: FakeTracer | None, engine: FakeEngine | None = None, **options: Any) -> Edge:
    edge = create_worker_app(engine or FakeEngine(num_cached=2), FakeModel(), **options)
    edge.tracing = None if tracer is None else Tracing(tracer)  # type: ignore[arg-type]
    return edge


def ask(edge: Edge, *headers: tuple[str, str], **fields: Any) -> Answer:
    body = {"model": "fake", "messages": [{"role": "user", "content": CANARY}], **fields}
    with running(edge) as app:
        return app.request(
            "POST", "/v1/chat/completions", json.dumps(body).encode(),
            headers=[("content-type", "application/json"), *headers],
        )  # fmt: skip


@pytest.mark.parametrize("is_stream", [True, False])
def test_an_answer_has_a_span_below_its_clients(tracer: FakeTracer, is_stream: bool) -> None:
    assert ask(worker(tracer), ("traceparent", PARENT), stream=is_stream).status == 200
    [span] = tracer.spans
    assert span.has_ended and span.status is None and span.name == "chat fake"
    assert f"{span.parent.trace_id:032x}-{span.parent.span_id:016x}" in PARENT
    assert span.attributes.pop("gen_ai.response.id").startswith("chatcmpl-")
    assert span.attributes.pop("gen_ai.response.time_to_first_chunk") >= 0
    assert span.attributes == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "chatserve",
        "gen_ai.request.model": "fake", "gen_ai.response.model": "fake",
        "gen_ai.response.finish_reasons": ("stop",), "gen_ai.usage.input_tokens": 24,
        "gen_ai.usage.output_tokens": 5, "gen_ai.usage.cache_read.input_tokens": 2,
        "http.request.method": "POST", "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
    }  # fmt: skip
    assert CANARY not in str(vars(span))


@pytest.mark.parametrize("parent", ["", "junk", "00-0-0-01", "\xff" * 300])
def test_a_parent_that_is_none_begins_a_trace(tracer: FakeTracer, parent: str) -> None:
    assert ask(worker(tracer), ("traceparent", parent)).status == 200
    assert tracer.spans[0].parent == INVALID_SPAN_CONTEXT


def test_errors_are_named_and_only_those_of_servers_fail(tracer: FakeTracer) -> None:
    broken = FakeEngine(error=GenerationFailed("it failed"))
    assert ask(worker(tracer, broken)).status == 500
    assert ask(worker(tracer), model=CANARY).status == 404
    assert ask(worker(tracer, broken), stream=True).status == 200
    failed, unknown, cut = tracer.spans
    assert failed.attributes["error.type"] == cut.attributes["error.type"] == "generation_failed"
    assert failed.status.description == cut.status.description == "generation_failed"
    assert unknown.attributes["error.type"] == "model_not_found" and unknown.status is None
    assert CANARY not in str([vars(span) for span in tracer.spans])


def test_only_what_a_model_answers_has_a_span(tracer: FakeTracer) -> None:
    with running(worker(tracer)) as app:
        for path in ("/v1/models", "/metrics", "/health/live", "/v1/chat/completions"):
            app.request("GET", path, headers=())
    assert not tracer.spans


def test_who_is_asked_on_its_behalf_gets_its_span(tracer: FakeTracer) -> None:
    copy_context().run(check_own_trace, tracer)


def check_own_trace(tracer: FakeTracer) -> None:
    outcome = begin()
    scope = {"method": "POST", "path": "/v1/completions", "headers": []}
    span: Any = Tracing(tracer).begin(scope, outcome)  # type: ignore[arg-type]
    trace_id = f"{span.context.trace_id:032x}"
    assert current_trace_id() == trace_id
    assert current_trace_headers() == {
        "traceparent": f"00-{trace_id}-{span.context.span_id:016x}-01"
    }
    line = json.loads(JsonLines("p").format(logging.makeLogRecord({"msg": "m"})))
    assert line["trace"] == trace_id


def test_a_key_is_asked_for_as_before(tracer: FakeTracer) -> None:
    policy = AccessPolicy.build("127.0.0.1", api_keys=["key"])
    assert ask(worker(tracer, policy=policy)).status == 401
    assert tracer.spans[0].attributes["error.type"] == "invalid_api_key"


def test_a_finished_answer_is_a_line_with_fields(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "chatserve")
    assert ask(worker(None), ("x-request-id", "mine")).status == 200
    [record] = [each for each in caplog.records if hasattr(each, "about")]
    line = json.loads(JsonLines("worker").format(record))
    assert line["model"] == "fake" and line["finish_reasons"] == ["stop"]
    counts = (line["prompt_tokens"], line["cached_tokens"], line["completion_tokens"])
    assert counts == (24, 2, 5)
    assert 0 <= line["ttft_s"] <= line["duration_s"] and line["tpot_s"] >= 0
    assert "request=mine" in line["message"] and "trace" not in line and CANARY not in str(line)


def test_off_it_costs_no_import() -> None:
    loaded = modules_after("import chatserve.server.worker, chatserve.server.launch")
    assert not [name for name in loaded if name.startswith("opentelemetry.sdk")]
    with traced(None, "worker") as tracing, traced("", "worker") as none:
        assert tracing is none is None


@pytest.fixture
def without_sdk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    yield


def test_without_the_packages_it_says_what_to_install(without_sdk: None) -> None:
    with (
        pytest.raises(UsageError, match=r"pip install 'chatserve\[otel\]'"),
        traced("http://127.0.0.1:4318/v1/traces", "worker"),
    ):
        pass


def test_the_real_sdk_takes_them() -> None:
    export = pytest.importorskip("opentelemetry.sdk.trace.export", reason="not installed: [otel]")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    provider = pytest.importorskip("opentelemetry.sdk.trace").TracerProvider()
    spans = memory.InMemorySpanExporter()
    provider.add_span_processor(export.SimpleSpanProcessor(spans))
    edge = create_worker_app(FakeEngine(), FakeModel())
    edge.tracing = Tracing(provider.get_tracer("chatserve"))
    assert ask(edge, ("traceparent", PARENT)).status == 200
    [span] = spans.get_finished_spans()
    assert span.name == "chat fake" and f"{span.context.trace_id:032x}" in PARENT
    assert span.attributes["gen_ai.usage.output_tokens"] == 5
