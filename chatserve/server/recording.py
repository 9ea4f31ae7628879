"""An engine that notes in the replay log what it is asked and what it says.

Every route is recorded that submits to it. It sees ids and parameters, never a header.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from chatserve.engine.admission import Admission
from chatserve.engine.sequence import Begun, LoadedAdapter, SamplingParams, TokenEvent
from chatserve.engine.waiting_line import Priority
from chatserve.meter import Meter
from chatserve.server.adapted import fingerprint_of
from chatserve.server.contract import Engine, ServedModel, Stats, TokenStream
from chatserve.server.replay_log import LoggedAnswer, ReplayLog

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "min_tokens", "ignore_eos", "seed",
)  # fmt: skip


class RecordingEngine:
    """`engine` as before, with `log`."""

    def __init__(self, engine: Engine, model: ServedModel, log: ReplayLog) -> None:
        self._engine = engine
        self._model = model
        self._log = log
        self._last_drawn: tuple[str, int] | None = None

    @property
    def admission(self) -> Admission:
        return self._engine.admission

    @property
    def meter(self) -> Meter:
        return self._engine.meter

    def start(self) -> None:
        self._engine.start()

    async def stop(self) -> None:
        await self._engine.stop()

    def stats(self) -> Stats:
        return self._engine.stats()

    def draw_seed(self) -> int:
        return self._engine.draw_seed()

    def submit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        choice: int = 0,
        salt: bytes = b"",
        adapter: LoadedAdapter | None = None,
        strip_leading_space: bool = False,
        priority: Priority = "interactive",
        begun: Begun | None = None,
    ) -> TokenStream:
        if params.seed is None:
            params = replace(params, seed=self._seed_for(request_id))
        stream = self._engine.submit(
            request_id, prompt_ids, params, choice=choice, salt=salt, adapter=adapter,
            priority=priority, strip_leading_space=strip_leading_space, begun=begun,
        )  # fmt: skip
        if params.max_tokens == 0:
            return stream
        answer = LoggedAnswer(
            request_id, choice, int(time.time()), self._model.names[0],
            adapter.name if adapter is not None else None,
            fingerprint_of(self._model, adapter), tuple(prompt_ids), sampling_of(params),
            grammar=None if params.grammar is None else asdict(params.grammar.origin),
            token_ids=(), finish_reason=None,
        )  # fmt: skip
        return _RecordedStream(stream, answer, self._log)

    def _seed_for(self, request_id: str) -> int:
        """The same for all choices of a prompt, which are submitted one after the other."""
        if self._last_drawn is None or self._last_drawn[0] != request_id:
            self._last_drawn = request_id, self._engine.draw_seed()
        return self._last_drawn[1]


def sampling_of(params: SamplingParams) -> dict[str, Any]:
    """What decides which token comes next, by the names of the API's fields."""
    return {name: getattr(params, name) for name in _SAMPLING}


class _RecordedStream:
    """A stream that is logged when it ends, or is closed before."""

    def __init__(self, stream: TokenStream, answer: LoggedAnswer, log: ReplayLog) -> None:
        self._stream = stream
        self._answer: LoggedAnswer | None = answer
        self._log = log
        self._token_ids: list[int] = []

    @property
    def place(self) -> int | None:
        return self._stream.place

    def __aiter__(self) -> _RecordedStream:
        return self

    async def __anext__(self) -> TokenEvent:
        event = await self._stream.__anext__()
        self._token_ids += event.token_ids
        if event.is_last:
            self._finish(event.finish_reason)
        return event

    async def aclose(self) -> None:
        self._finish(None)
        await self._stream.aclose()

    def _finish(self, reason: str | None) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            self._log.add(replace(answer, token_ids=self._token_ids, finish_reason=reason))
