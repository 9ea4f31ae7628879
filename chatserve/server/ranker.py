"""The answers of one request, read by a reward model when they are complete: `Ranker`."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from chatserve.server.contract import Engine, ServedModel
from chatserve.server.embedding_preparation import Pooled
from chatserve.server.pooled_batch import PooledBatch
from chatserve.server.preparation import Prepared
from chatserve.server.preparation_pool import PreparationPool
from chatserve.server.ranking import Ranking
from chatserve.server.rating import RATING

logger = logging.getLogger(__name__)


class Ranker:
    """Rates answers on the same base; those to one question share what it takes to read it."""

    def __init__(
        self, engine: Engine, model: ServedModel, pool: PreparationPool, prepared: Prepared,
        ranking: Ranking, request_id: str, salt: bytes,
    ) -> None:  # fmt: skip
        self.num_tokens = 0
        """So many were read, each text once."""
        self._engine = engine
        self._model = model
        self._pool = pool
        self._prepared = prepared
        self._ranking = ranking
        self._request_id = request_id
        self._salt = salt

    async def scores(self, texts: Sequence[str]) -> list[float]:
        """Of each answer, in the order of the choices; a text that was said twice is read once.

        Raises `ContextLengthExceeded` for an answer that the reward model cannot hold whole, and
        what the engine raises; nothing is left running then.
        """
        started_at = time.monotonic()
        num_choices = self._prepared.num_choices
        scores: list[float] = []
        for place in range(len(self._prepared.prompts)):
            group = texts[place * num_choices : (place + 1) * num_choices]
            scores += await self._of_one_question(place, group)
        logger.info(
            "%s ranked by %s: answers=%d tokens=%d ms=%.0f",
            self._request_id, self._ranking.adapter.name, len(scores), self.num_tokens,
            (time.monotonic() - started_at) * 1e3,
        )  # fmt: skip
        return scores

    async def _of_one_question(self, place: int, texts: Sequence[str]) -> list[float]:
        places = await self._pool.run(self._encoded, place, texts)
        prompts: dict[tuple[int, ...], int] = {}
        for ids in places:
            prompts.setdefault(ids, len(prompts))
        self.num_tokens += sum(map(len, prompts))
        pooled = Pooled(
            self._prepared.model, tuple(prompts), RATING, self._ranking.adapter, None,
            self._prepared.priority,
        )  # fmt: skip
        batch = PooledBatch(
            self._engine, f"{self._request_id}-rank{place}", pooled, self._salt,
            has_leader=True, is_begun=True,
        )  # fmt: skip
        vectors = await batch.run()
        return [self._ranking.reward.score(vectors[prompts[ids]]) for ids in places]

    def _encoded(self, place: int, texts: Sequence[str]) -> list[tuple[int, ...]]:
        return [self._ranking.ids(place, text, self._model) for text in texts]
