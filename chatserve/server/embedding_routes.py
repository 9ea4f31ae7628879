"""A worker's /v1/embeddings and /v1/score: many prompts, a few at a time, one vector each."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import uuid
from collections import deque

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from chatserve.errors import GenerationFailed, Overloaded
from chatserve.protocol.embeddings import EMBEDDINGS_PATH, SCORE_PATH
from chatserve.server.cache_salt import salt_of
from chatserve.server.contract import Engine, TokenStream
from chatserve.server.disconnect import nobody_listens, until_disconnect
from chatserve.server.door import hand_over
from chatserve.server.embedding_preparation import Pooled, prepare_embeddings, prepare_score
from chatserve.server.embedding_replies import Vector, embeddings_reply, score_reply
from chatserve.server.json_response import JSON_TYPE
from chatserve.server.model_slot import ModelSlot
from chatserve.server.preparation_pool import PreparationPool
from chatserve.server.request_id import current_request_id

logger = logging.getLogger(__name__)

# of one request at a time: chats find a place beside thousands of documents
MAX_IN_FLIGHT = 8
# until a request that is the last of its own in a full queue asks again
RETRY_S = 0.05


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
        """How alike pairs of texts are: the cosine of their embeddings."""
        engine, model = self._slot.served()
        prepared = await self._pool.run(prepare_score, await request.body(), model)
        pooled = prepared.pooled
        reply_id = "score-" + uuid.uuid4().hex
        try:
            vectors = await self._compute(request, engine, reply_id, pooled)
        except ClientDisconnect:
            return nobody_listens(request)
        write = functools.partial(
            score_reply, reply_id=reply_id, created=int(time.time()), model=pooled.model,
            usage=pooled.usage,
        )  # fmt: skip
        return Response(await self._pool.run(write, vectors, prepared.pairs), media_type=JSON_TYPE)

    async def _compute(
        self, request: Request, engine: Engine, reply_id: str, pooled: Pooled
    ) -> list[Vector]:
        """The vectors in order. Raises what the engine raises; nothing is left running then."""
        started_at = time.monotonic()
        salt = salt_of(request.headers, self._control_token)
        batch = _Batch(engine, reply_id, pooled, salt)
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


class _Batch:
    """The prompts of one request on their way through the engine."""

    def __init__(self, engine: Engine, request_id: str, pooled: Pooled, salt: bytes) -> None:
        self._engine = engine
        self._request_id = request_id
        self._pooled = pooled
        self._salt = salt
        self._waiting = deque(range(len(pooled.prompts)))
        self._vectors: dict[int, Vector] = {}
        self._num_lanes = 0

    async def run(self) -> list[Vector]:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(MAX_IN_FLIGHT, len(self._waiting))):
                    self._num_lanes += 1
                    group.create_task(self._work())
        except BaseExceptionGroup as failures:
            # the others were cancelled because of it
            raise failures.exceptions[0] from None
        return [self._vectors[index] for index in range(len(self._pooled.prompts))]

    async def _work(self) -> None:
        """Prompt after prompt. Where the queue is full, those that are on their way go first.

        A request is refused only while nothing of it has been computed.
        """
        while self._waiting:
            index = self._waiting.popleft()
            try:
                stream = self._submit(index)
            except Overloaded:
                self._waiting.appendleft(index)
                if self._num_lanes > 1:
                    self._num_lanes -= 1
                    return
                if not self._vectors:
                    raise
                await asyncio.sleep(RETRY_S)
                continue
            self._vectors[index] = await _vector_of(stream)

    def _submit(self, index: int) -> TokenStream:
        hand_over()
        return self._engine.submit(
            f"{self._request_id}-{index}", self._pooled.prompts[index], self._pooled.params,
            salt=self._salt, adapter=self._pooled.adapter, priority=self._pooled.priority,
        )  # fmt: skip


async def _vector_of(stream: TokenStream) -> Vector:
    try:
        async for event in stream:
            if event.error is not None:
                raise event.error
            if event.embedding is not None:
                return event.embedding
    finally:
        await stream.aclose()
    raise GenerationFailed("the engine ended a prompt without its embedding; try again")
