"""OpenTelemetry traces: a span for each request that is answered by a model, in both processes.

Off unless an endpoint is named; nothing of OpenTelemetry's SDK is imported then. Names and
attributes are those of the GenAI conventions; no prompt, no answer, no key is in any.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import chatserve
from chatserve.errors import ChatserveError, UsageError
from chatserve.protocol.anthropic import MESSAGES_PATH
from chatserve.protocol.control import RESUME_PATH
from chatserve.protocol.embeddings import EMBEDDINGS_PATH
from chatserve.protocol.responses import RESPONSES_PATH
from chatserve.server.outcome import Outcome

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer
    from starlette.types import Scope

logger = logging.getLogger(__name__)

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    MESSAGES_PATH: "chat",
    RESPONSES_PATH: "chat",
    RESUME_PATH: "chat",
    EMBEDDINGS_PATH: "embeddings",
}
TRACE_HEADERS = ("traceparent", "tracestate")
EXPORT_S = 5.0
CLOSE_S = 3.0


class Tracing:
    """Begins and ends spans of `tracer`."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def begin(self, scope: Scope, outcome: Outcome) -> Span | None:
        """Of a request as it comes, below the span that its client names; None for others."""
        operation = OPERATIONS.get(scope["path"]) if scope["method"] == "POST" else None
        if operation is None:
            return None
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        span = self._tracer.start_span(
            operation,
            context=propagator.extract(_trace_headers(scope)),
            kind=trace.SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "chatserve",
                "http.request.method": "POST",
                "url.path": scope["path"],
            },
        )
        propagator.inject(outcome.trace_headers, trace.set_span_in_context(span))
        outcome.operation = operation
        outcome.trace_id = trace.format_trace_id(span.get_span_context().trace_id)
        return span

    def end(self, span: Span, outcome: Outcome) -> None:
        """The answer is over; what became of it is in `outcome`."""
        from opentelemetry.trace import Status, StatusCode

        attributes: dict[str, Any] = {}
        if outcome.status:
            attributes["http.response.status_code"] = outcome.status
        if (answered := outcome.answered) is not None:
            attributes |= {
                "gen_ai.request.model": answered.model,
                "gen_ai.response.model": answered.model,
                "gen_ai.response.id": answered.answer_id,
                "gen_ai.response.finish_reasons": answered.finish_reasons,
                "gen_ai.usage.input_tokens": answered.prompt_tokens,
                "gen_ai.usage.output_tokens": answered.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": answered.cached_tokens,
            }
            if answered.ttft_s is not None:
                attributes["gen_ai.response.time_to_first_chunk"] = answered.ttft_s
            span.update_name(f"{outcome.operation} {answered.model}")
        elif outcome.model is not None:
            attributes["gen_ai.request.model"] = outcome.model
            span.update_name(f"{outcome.operation} {outcome.model}")
        if outcome.error is not None:
            error = outcome.error
            code = error.code if isinstance(error, ChatserveError) else ChatserveError.code
            attributes["error.type"] = code
            # what a client did wrong is no failure of a server
            if outcome.error_status >= 500:
                span.set_status(Status(StatusCode.ERROR, code))
        span.set_attributes(attributes)
        span.end()


@contextlib.contextmanager
def traced(endpoint: str | None, process: str) -> Iterator[Tracing | None]:
    """Meanwhile spans of `process` go to `endpoint` (OTLP over HTTP); None where none is named.

    Raises `UsageError` where OpenTelemetry is not installed.
    """
    if not endpoint:
        yield None
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UsageError(
            f"--otlp-traces-endpoint needs OpenTelemetry ({error}); "
            "run `pip install 'chatserve[otel]'`, or leave the flag out"
        ) from error
    about = {"service.name": f"chatserve-{process}", "service.version": chatserve.__version__}
    # ours alone, and closed below: nothing else of this process is traced
    provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    logger.info("traces go to %s", endpoint)
    try:
        yield Tracing(provider.get_tracer("chatserve", chatserve.__version__))
    finally:
        # a collector that does not answer must not keep the process
        closing = threading.Thread(target=provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def _trace_headers(scope: Scope) -> dict[str, str]:
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in scope["headers"]
        if name.decode("latin-1") in TRACE_HEADERS
    }
