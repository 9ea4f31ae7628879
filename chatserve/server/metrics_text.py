"""The text of `/metrics`, as Prometheus reads it. Names follow vLLM's; ADR 030 has the mapping.

Labels have few values, none of which a client chooses: names of served models, small numbers of
workers, codes of errors, statuses. The library is imported where somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import chatserve
from chatserve.meter import BOUNDS, HistogramName
from chatserve.protocol.control import WorkerStatus
from chatserve.protocol.measured import Key
from chatserve.server.fleet import Place

if TYPE_CHECKING:
    from prometheus_client.core import Metric

PREFIX = "chatserve_"
LABELS = ("model", "worker")
STATES = ("loading", "ready", "draining", "stalled", "unreachable", "gone")
HISTOGRAMS: dict[HistogramName, tuple[str, str]] = {
    "time_to_first_token": (
        "time_to_first_token_seconds", "From a request's arrival to its first token"
    ),
    "inter_token_latency": (
        "inter_token_latency_seconds", "From one token of an answer to the next"
    ),
    "time_per_output_token": (
        "request_time_per_output_token_seconds", "Mean time between the tokens of one answer"
    ),
    "e2e_latency": (
        "e2e_request_latency_seconds", "From a request's arrival to the end of its answer"
    ),
    "queue_time": (
        "request_queue_time_seconds", "From a request's arrival to its turn"
    ),
    "step_time": ("step_time_seconds", "One step of the engine"),
}  # fmt: skip
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts, each prompt once"),
    "cached_tokens": ("prompt_tokens_cached", "Of those, tokens from the prefix cache"),
    "generation_tokens": ("generation_tokens", "Tokens that were generated"),
    "num_preempted": ("num_preemptions", "Times that a sequence had to give its memory back"),
}


@dataclass(frozen=True)
class Seen:
    """A worker's place as it is at one moment, and what is known of who is there; nobody where it
    is gone. Nothing of it changes any more: it may be looked at from another thread."""

    model: str
    number: int
    num_starts: int
    tokens_per_s: float
    total: Mapping[Key, float]
    state: str = "gone"
    status: WorkerStatus | None = None

    @classmethod
    def of(cls, place: Place, state: str = "gone", status: WorkerStatus | None = None) -> Seen:
        return cls(
            place.model, place.number, place.num_starts, place.rate("generation_tokens"),
            place.total(), state, status,
        )  # fmt: skip


def metrics_text(
    seen: Sequence[Seen],
    by_code: Mapping[str, int],
    by_status: Mapping[int, int],
    *,
    accept: str = "",
) -> tuple[bytes, str]:
    """The text, and its media type. `by_code`: errors that this process has told by itself,
    `by_status`: its answers."""
    from prometheus_client.exposition import choose_encoder

    class Collector:
        def collect(self) -> Iterator[Metric]:
            yield from _counted(seen)
            yield from _measured(seen)
            yield from _of_this_process(by_code, by_status)

    encode, media_type = choose_encoder(accept)
    return encode(Collector()), media_type


def _labels(each: Seen) -> list[str]:
    return [each.model, str(each.number)]


def _counted(seen: Sequence[Seen]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

    for name, (shown, about) in COUNTERS.items():
        counter = CounterMetricFamily(PREFIX + shown, about, labels=LABELS)
        for each in seen:
            counter.add_metric(_labels(each), each.total.get(("counter", name, 0), 0))
        yield counter
    for kind, shown, about, label in (
        ("outcome", "request_success", "Sequences that have ended, by how", "finished_reason"),
        ("error", "request_errors", "Errors that workers have told, by code", "code"),
    ):
        counter = CounterMetricFamily(PREFIX + shown, about, labels=[*LABELS, label])
        for each in seen:
            for (family, name, _), value in sorted(each.total.items()):
                if family == kind:
                    counter.add_metric([*_labels(each), name], value)
        yield counter
    for histogram_name, (shown, about) in HISTOGRAMS.items():
        histogram = HistogramMetricFamily(PREFIX + shown, about, labels=LABELS)
        for each in seen:
            histogram.add_metric(_labels(each), *_buckets(histogram_name, each.total))
        yield histogram


def _buckets(
    name: HistogramName, total: Mapping[Key, float]
) -> tuple[list[tuple[str, float]], float]:
    bounds = [*(repr(bound) for bound in BOUNDS[name]), "+Inf"]
    counts = (total.get(("bucket", name, index), 0) for index in range(len(bounds)))
    return list(zip(bounds, accumulate(counts), strict=True)), total.get(("sum", name, 0), 0)


def _measured(seen: Sequence[Seen]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    gauges = {
        "num_requests_running": "Sequences in the batch",
        "num_requests_waiting": "Sequences that wait for their turn",
        "kv_cache_usage_ratio": "Share of the places for keys and values that is in use",
        "kv_cache_tokens": "Places for keys and values, in tokens",
        "generation_tokens_per_second": "Tokens a second, over the last 10 seconds",
        "expected_wait_seconds": "What who comes now has to expect before its turn",
        "process_resident_memory_bytes": "Main memory of the worker's process",
        "device_memory_used_bytes": "Memory of the device that is in use, by whomever",
        "device_memory_total_bytes": "Memory of the device",
        "weights_loaded_bytes": "Bytes of the weights that have been read",
        "weights_total_bytes": "Bytes of the weights",
    }
    families = {
        name: GaugeMetricFamily(PREFIX + name, about, labels=LABELS)
        for name, about in gauges.items()
    }
    states = GaugeMetricFamily(
        PREFIX + "worker_state", "1 at what the worker is at", labels=[*LABELS, "state"]
    )
    starts = CounterMetricFamily(
        PREFIX + "worker_starts", "Workers that there have been, one after the other", labels=LABELS
    )
    for each in seen:
        labels = _labels(each)
        for state in STATES:
            states.add_metric([*labels, state], float(state == each.state))
        starts.add_metric(labels, each.num_starts)
        for name, value in _now(each).items():
            families[name].add_metric(labels, value)
    yield from families.values()
    yield states
    yield starts


def _now(each: Seen) -> dict[str, float]:
    status = each.status
    if status is None or status.metrics is None:
        return {}
    metrics = status.metrics
    numbers: dict[str, float] = {
        "num_requests_running": status.num_running,
        "num_requests_waiting": status.num_waiting,
        "generation_tokens_per_second": each.tokens_per_s,
        "expected_wait_seconds": status.wait_s,
        "process_resident_memory_bytes": metrics.rss_bytes,
        "weights_loaded_bytes": status.loaded_bytes,
        "weights_total_bytes": status.total_bytes,
    }
    if metrics.num_kv_tokens:
        used = max(0, metrics.num_kv_tokens - status.free_kv_tokens)
        numbers["kv_cache_usage_ratio"] = used / metrics.num_kv_tokens
        numbers["kv_cache_tokens"] = metrics.num_kv_tokens
    if metrics.device_total_bytes:
        numbers["device_memory_used_bytes"] = metrics.device_used_bytes
        numbers["device_memory_total_bytes"] = metrics.device_total_bytes
    return numbers


def _of_this_process(by_code: Mapping[str, int], by_status: Mapping[int, int]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    answers = CounterMetricFamily(
        PREFIX + "http_responses", "Answers of this server, by status", labels=["status"]
    )
    for status, count in sorted(by_status.items()):
        answers.add_metric([str(status)], count)
    yield answers
    told = CounterMetricFamily(
        PREFIX + "server_errors", "Errors that this server has told by itself, by code",
        labels=["code"],
    )  # fmt: skip
    for code, count in sorted(by_code.items()):
        told.add_metric([code], count)
    yield told
    about = GaugeMetricFamily(PREFIX + "build_info", "1, for the version", labels=["version"])
    about.add_metric([chatserve.__version__], 1.0)
    yield about
