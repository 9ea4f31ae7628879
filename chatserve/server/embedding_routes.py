"""A worker's /v1/embeddings and /v1/score: many prompts, a few at a time, one vector each."""

from __future__ import annotations

import functools
import logging
import time
import uuid

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from chatserve.protocol.embeddings import EMBEDDINGS_PATH, SCORE_PATH
from chatserve.server.cache_salt import salt_of
from chatserve.server.contract import Engine
from chatserve.server.disconnect import nobody_listens, until_disconnect
from chatserve.server.embedding_preparation import Pooled, prepare_embeddings, prepare_score
from chatserve.server.embedding_replies import Vector, embeddings_reply, score_reply
from chatserve.server.json_response import JSON_TYPE
from chatserve.server.model_slot import ModelSlot
from chatserve.server.pooled_batch import PooledBatch
from chatserve.server.preparation_pool import PreparationPool
from chatserve.server.request_id import current_request_id

logger = logging.getLogger(__name__)


class EmbeddingRoutes:
    def __init__(self, slot: ModelSlot, pool: PreparationPool, control_token: str | None) -> None:
        self._slot = slot
        self._pool = pool
        self._control_token = control_token

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route(EMBEDDINGS_PATH, self.embeddings, methods=["POST"])
        app.add_api_route(SCORE_PATH, self.score, methods=["POST"])

    async def embeddings(self, request: Request) -> Response:
        """A vector of length 1 for each input."""
        engine, model = self._slot.served()
        prepared = await self._pool.run(prepare_embeddings, await request.body(), model)
        pooled = prepared.pooled
        try:
            vectors = await self._compute(request, engine, "embd-" + uuid.uuid4().hex, pooled)
        except ClientDisconnect:
            return nobody_listens(request)
        write = functools.partial(
            embeddings_reply,
            num_dimensions=prepared.num_dimensions,
            is_base64=prepared.is_base64,
        )
        reply = await self._pool.run(write, vectors, pooled.model, pooled.usage)
        return Response(reply, media_type=JSON_TYPE)

    async def score(self, request: Request) -> Response:
        """How alike pairs of texts are, the cosine of their embeddings; of a reward model, how good
        the second is as an answer to the first."""
        engine, model = self._slot.served()
        prepared = await self._pool.run(prepare_score, await request.body(), model)
        pooled = prepared.pooled
        reply_id = "score-" + uuid.uuid4().hex
        has_leader = prepared.shares_beginning
        try:
            vectors = await self._compute(request, engine, reply_id, pooled, has_leader=has_leader)
        except ClientDisconnect:
            return nobody_listens(request)
        write = functools.partial(
            score_reply, reply_id=reply_id, created=int(time.time()), model=pooled.model,
            usage=pooled.usage,
        )  # fmt: skip
        scores = await self._pool.run(prepared.scores, vectors)
        return Response(await self._pool.run(write, scores), media_type=JSON_TYPE)

    async def _compute(
        self,
        request: Request,
        engine: Engine,
        reply_id: str,
        pooled: Pooled,
        *,
        has_leader: bool = False,
    ) -> list[Vector]:
        """The vectors in order. Raises what the engine raises; nothing is left running then."""
        started_at = time.monotonic()
        salt = salt_of(request.headers, self._control_token)
        batch = PooledBatch(engine, reply_id, pooled, salt, has_leader=has_leader)
        outcome = "abort"
        try:
            vectors = await until_disconnect(request.receive, batch.run())
            outcome = "ok"
            return vectors
        finally:
            logger.info(
                "%s request=%s model=%s inputs=%d prompt_tokens=%d ms=%.0f finish=%s",
                reply_id, current_request_id(), pooled.model, len(pooled.prompts),
                pooled.usage["prompt_tokens"],
                (time.monotonic() - started_at) * 1e3, outcome,
            )  # fmt: skip
