"""The operator's own requests: load and unload models, let a worker finish, see how far each is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from chatserve.errors import ChatserveError, InvalidRequest, ModelNotFound
from chatserve.options import ModelOptions
from chatserve.protocol.operation import (
    DRAIN_WORKER_PATH,
    LOAD_MODEL_PATH,
    MODELS_PATH,
    UNLOAD_MODEL_PATH,
    DrainWorker,
    LoadModel,
    UnloadModel,
    parse,
)
from chatserve.server.disconnect import nobody_listens, until_disconnect
from chatserve.server.edge import OPERATOR
from chatserve.server.json_response import json_response
from chatserve.server.registry import WorkerRegistry
from chatserve.server.repertoire.model import Model
from chatserve.server.repertoire.models import Repertoire
from chatserve.server.repertoire.rows import ModelRows, as_seen_by
from chatserve.server.repertoire.sources import check_source, name_for

logger = logging.getLogger(__name__)


class RepertoireRoutes:
    """Of a controller; `repertoire` None: one that starts no workers itself."""

    def __init__(
        self,
        registry: WorkerRegistry,
        repertoire: Repertoire | None,
        rows: ModelRows,
        options: ModelOptions | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._repertoire = repertoire
        self._rows = rows
        self._options = options or ModelOptions()
        self._clock = clock
        self._jobs: set[asyncio.Future[Any]] = set()

    def add_to(self, app: FastAPI) -> None:
        app.add_route(MODELS_PATH, self.list_models, methods=["GET"])
        app.add_route(LOAD_MODEL_PATH, self.load, methods=["POST"])
        app.add_route(UNLOAD_MODEL_PATH, self.unload, methods=["POST"])
        app.add_route(DRAIN_WORKER_PATH, self.drain, methods=["POST"])

    async def list_models(self, request: Request) -> Response:
        """How far each model is, what it takes, and what of its time is left. Where its files lie
        is for operators."""
        policy = self._repertoire.policy if self._repertoire is not None else None
        return json_response(
            {
                "models": [
                    as_seen_by(row, is_operator=bool(request.scope.get(OPERATOR)))
                    for row in self._rows.rows(self._clock())
                ],
                "auto_load": policy is not None and policy.auto_load,
                "max_loaded_bytes": None if policy is None else policy.max_bytes,
                "keep_alive_s": None if policy is None else policy.keep_alive_s,
            }
        )

    async def load(self, request: Request) -> Response:
        """Load a model. Raises `CannotLoad` in its worker's own words."""
        repertoire = self._own_repertoire()
        asked = parse(LoadModel, await request.body())
        model = await self._named(repertoire, asked, is_operator=bool(request.scope.get(OPERATOR)))
        return await self._answer(request, model, repertoire.load(model), asked.wait)

    async def unload(self, request: Request) -> Response:
        """Let a model's answers end, and give its memory back."""
        repertoire = self._own_repertoire()
        asked = parse(UnloadModel, await request.body())
        model = next((each for each in repertoire.models() if each.name == asked.model), None)
        if model is None:
            raise self._unknown(repertoire, asked.model)
        return await self._answer(
            request, model, self._beside(repertoire.unload(model)), asked.wait
        )

    async def drain(self, request: Request) -> Response:
        """Give a worker nothing more to do. One of this server's own ends when it has finished, and
        its model is unloaded; another one waits to be stopped, or started anew."""
        asked = parse(DrainWorker, await request.body())
        worker = self._registry.find(asked.id)
        if worker is None:
            raise ModelNotFound(
                f"no worker has the id {asked.id}; /admin/models tells those of models", param="id"
            )
        self._registry.set_aside(asked.id)
        models = [] if self._repertoire is None else self._repertoire.models()
        for model in models:
            if self._repertoire and model.started and model.started.worker_id == asked.id:
                self._beside(self._repertoire.unload(model))
        return json_response({"id": asked.id, "state": "draining", "running": len(worker.leases)})

    def _own_repertoire(self) -> Repertoire:
        if self._repertoire is None:
            raise InvalidRequest(
                "this controller starts no workers itself; start one by `chatserve worker WEIGHTS "
                "--controller URL`, and stop it there"
            )
        return self._repertoire

    async def _named(self, repertoire: Repertoire, asked: LoadModel, *, is_operator: bool) -> Model:
        if (asked.model is None) == (asked.weights is None):
            raise InvalidRequest("name either `model` or `weights`", param="model")
        known = {each.name: each for each in repertoire.models()}
        if asked.model is not None and asked.model in known:
            return known[asked.model]
        weights = asked.weights or asked.model or ""
        for model in known.values():
            if model.weights == weights and asked.name in (None, model.name):
                return model
        weights = await asyncio.to_thread(
            check_source, weights, is_operator=is_operator,
            revision=self._options.revision, offline=self._options.offline,
        )  # fmt: skip
        return repertoire.declare(name_for(asked, weights), weights, is_lasting=False)

    async def _answer(
        self, request: Request, model: Model, work: asyncio.Future[None], is_wanted: bool
    ) -> Response:
        """Who leaves, or does not wait, ends nothing."""
        if not is_wanted:
            work.add_done_callback(_log_failure)
            return json_response(self._row(request, model), 202)

        async def done() -> None:
            await asyncio.shield(work)

        try:
            await until_disconnect(request.receive, done())
        except ClientDisconnect:
            work.add_done_callback(_log_failure)
            return nobody_listens(request)
        return json_response(self._row(request, model))

    def _row(self, request: Request, model: Model) -> dict[str, Any]:
        rows = self._rows.rows(self._clock())
        row = next(row for row in rows if row["name"] == model.name)
        return as_seen_by(row, is_operator=bool(request.scope.get(OPERATOR)))

    def _beside(self, work: Any) -> asyncio.Future[None]:
        job: asyncio.Future[None] = asyncio.ensure_future(work)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        job.add_done_callback(_log_failure)
        return job

    def _unknown(self, repertoire: Repertoire, name: str) -> ChatserveError:
        names = ", ".join(each.name for each in repertoire.models()) or "none"
        return ModelNotFound(
            f"{name[:100]!r} is no model of this server; there is {names}", param="model"
        )


def _log_failure(work: asyncio.Future[None]) -> None:
    if not work.cancelled() and (error := work.exception()) is not None:
        logger.info("%s", error)
