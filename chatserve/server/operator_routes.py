"""What an operator looks at: `/metrics` and `/admin/status`, of a controller or of a lone worker.

Reads only; whoever may call the API may read it. No prompt, no key, no client's words.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

import chatserve
from chatserve.protocol.control import SOCKET_SCHEME, WorkerStatus
from chatserve.protocol.measured import METRICS_PATH, STATUS_PATH, RecentError
from chatserve.server.error_log import ErrorLog
from chatserve.server.fleet import HISTORY_STEP_S, RATE_S, WINDOW_S, Fleet, Place
from chatserve.server.json_response import json_response
from chatserve.server.metrics_text import Seen, metrics_text

SAMPLE_S = 2.0
LONE_WORKER = "lone"

WorkerSeen = tuple[str, str, str, WorkerStatus]
"""Id, state, address, and what it said last."""


class OperatorRoutes:
    """`workers` are those that are there now; `more` is what the status says beside them."""

    def __init__(
        self,
        workers: Callable[[], Sequence[WorkerSeen]],
        errors: ErrorLog,
        *,
        is_draining: Callable[[], bool],
        more: Callable[[], Mapping[str, Any]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.fleet = Fleet(clock)
        self._workers = workers
        self._errors = errors
        self._is_draining = is_draining
        self._more = more
        self._clock = clock
        self._started_at = clock()

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route(METRICS_PATH, self.metrics)
        app.add_api_route(STATUS_PATH, self.status)

    @asynccontextmanager
    async def watching(self, hear: Callable[[], None] = lambda: None) -> AsyncIterator[None]:
        """Meanwhile notes how fast it goes; `hear` is called each time before."""

        async def watch() -> None:
            while True:
                hear()
                self.fleet.history(self._known())
                await asyncio.sleep(SAMPLE_S)

        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def hear(self, worker_id: str, status: WorkerStatus) -> None:
        """What a worker says of itself."""
        base = next((card.name for card in status.models if card.parent is None), "")
        self.fleet.hear(worker_id, base, status.metrics, self._known())

    async def metrics(self, request: Request) -> Response:
        accept = request.headers.get("accept", "")
        # with many workers it takes longer than a stream should wait for its next token
        text, media_type = await asyncio.to_thread(
            metrics_text, self._seen(), dict(self._errors.by_code), dict(self._errors.by_status),
            accept=accept,
        )  # fmt: skip
        return Response(text, headers={"Content-Type": media_type})

    async def status(self) -> Response:
        return json_response(self.overview())

    def overview(self) -> dict[str, Any]:
        workers = [self._worker(*each) for each in self._workers()]
        return {
            "server": {
                "version": chatserve.__version__,
                "uptime_s": round(self._clock() - self._started_at, 1),
                "draining": self._is_draining(),
                "window_s": WINDOW_S,
                "rate_s": RATE_S,
            },
            "workers": workers,
            "queue": {
                "running": sum(each["running"] for each in workers),
                "waiting": sum(each["waiting"] for each in workers),
                "wait_s": min((each["wait_s"] for each in workers), default=0.0),
            },
            "tokens_per_s": {
                "now": round(self.fleet.tokens_per_s(self._known()), 2),
                "step_s": HISTORY_STEP_S,
                "history": self.fleet.history(self._known()),
            },
            "errors": self._recent(),
            **self._more(),
        }

    def _known(self) -> list[str]:
        return [worker_id for worker_id, *_ in self._workers()]

    def _seen(self) -> list[Seen]:
        present = {worker_id: (state, status) for worker_id, state, _, status in self._workers()}
        return [
            Seen.of(place, *present.get(place.worker_id, ("gone", None)))
            for place in self.fleet.places()
        ]

    def _worker(
        self, worker_id: str, state: str, address: str, status: WorkerStatus
    ) -> dict[str, Any]:
        metrics, place = status.metrics, self.fleet.place(worker_id)
        memory = {"device": "", "device_used_bytes": 0, "device_total_bytes": 0, "rss_bytes": 0}
        num_kv_tokens = 0
        if metrics is not None:
            num_kv_tokens = metrics.num_kv_tokens
            memory = {name: getattr(metrics, name) for name in memory}
        return {
            "id": worker_id,
            "number": place.number if place else None,
            "models": [card.name for card in status.models],
            "state": state,
            "address": address,
            **memory,
            "kv_used_tokens": max(0, num_kv_tokens - status.free_kv_tokens),
            "kv_total_tokens": num_kv_tokens,
            "running": status.num_running,
            "waiting": status.num_waiting,
            "wait_s": round(status.wait_s, 3),
            "tokens_per_s": _rate(place, "generation_tokens"),
            "prompt_tokens_per_s": _rate(place, "prompt_tokens"),
            "ttft_s": place.percentiles("time_to_first_token") if place else {},
            "itl_s": place.percentiles("inter_token_latency") if place else {},
            "loaded_bytes": status.loaded_bytes,
            "total_bytes": status.total_bytes,
            "num_starts": place.num_starts if place else 1,
        }

    def _recent(self) -> list[dict[str, Any]]:
        """The latest first, each with the model whose worker told it; of the server itself none."""
        found: list[tuple[RecentError, str | None]] = [
            (each, None) for each in self._errors.recent()
        ]
        for worker_id, _, _, status in self._workers():
            if status.metrics is None or worker_id == LONE_WORKER:
                continue
            base = next((card.name for card in status.models if card.parent is None), None)
            found += [(each, base) for each in status.metrics.recent_errors]
        found.sort(key=lambda pair: -pair[0].at)
        return [_told(error, model) for error, model in found[:100]]


def _told(error: RecentError, model: str | None) -> dict[str, Any]:
    return {
        "time": error.at, "code": error.code, "model": model, "message": error.message,
        "count": error.count,
    }  # fmt: skip


def shown_address(base_url: str) -> str:
    """Where in the file system a worker listens is nobody's business."""
    return "a private socket" if base_url.startswith(SOCKET_SCHEME) else base_url


def _rate(place: Place | None, name: str) -> float:
    return round(place.rate(name), 2) if place else 0.0
