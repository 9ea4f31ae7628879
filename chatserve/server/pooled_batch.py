"""The texts of one request on their way through the engine: a few at a time, one vector each."""

from __future__ import annotations

import asyncio
from collections import deque

from chatserve.errors import GenerationFailed, Overloaded
from chatserve.server.contract import Engine, TokenStream
from chatserve.server.door import hand_over
from chatserve.server.embedding_preparation import Pooled
from chatserve.server.embedding_replies import Vector

# of one request at a time: chats find a place beside thousands of documents
MAX_IN_FLIGHT = 8
# until a request that is the last of its own in a full queue asks again
RETRY_S = 0.05


class PooledBatch:
    """Computes `pooled`; prompts of one `salt` may share a cache.

    `has_leader`: the first goes alone, so that the others find in the cache what they all begin
    with. `is_begun`: something of the request has been computed already, and it is not refused any
    more.
    """

    def __init__(
        self,
        engine: Engine,
        request_id: str,
        pooled: Pooled,
        salt: bytes,
        *,
        has_leader: bool = False,
        is_begun: bool = False,
    ) -> None:
        self._engine = engine
        self._request_id = request_id
        self._pooled = pooled
        self._salt = salt
        self._has_leader = has_leader
        self._is_begun = is_begun
        self._waiting = deque(range(len(pooled.prompts)))
        self._vectors: dict[int, Vector] = {}
        self._num_lanes = 0

    async def run(self) -> list[Vector]:
        """The vectors in order. Raises what the engine raises; nothing is left running then."""
        if self._has_leader:
            followers, self._waiting = self._waiting, deque([self._waiting.popleft()])
            await self._drain()
            self._waiting = followers
        await self._drain()
        return [self._vectors[index] for index in range(len(self._pooled.prompts))]

    async def _drain(self) -> None:
        self._num_lanes = 0
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(MAX_IN_FLIGHT, len(self._waiting))):
                    self._num_lanes += 1
                    group.create_task(self._work())
        except BaseExceptionGroup as failures:
            # the others were cancelled because of it
            raise failures.exceptions[0] from None

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
                if not self._vectors and not self._is_begun:
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
