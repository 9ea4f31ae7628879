"""The sequences of one request, from submission to their last event; closing it aborts them all.

Knows no JSON: it hands on `(index, TokenEvent)` for whoever streams or folds them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict, replace

from starlette.types import Receive

from chatserve.engine.sequence import TokenEvent
from chatserve.errors import GenerationFailed
from chatserve.server.contract import Engine, TokenStream
from chatserve.server.disconnect import until_disconnect
from chatserve.server.door import hand_over
from chatserve.server.outcome import Answered, note_answer
from chatserve.server.preparation import Prepared
from chatserve.server.request_id import current_request_id
from chatserve.server.resumption import UNSAID, Resumption

logger = logging.getLogger(__name__)

# further events wait in the engine, where they are bounded per sequence
MAX_QUEUED_EVENTS = 16
REPLAYED_AT_ONCE = 256
"""Events; then other streams have their turn."""


class Generation:
    """Submits every choice of every prompt at once; prompts of one `salt` may share a cache.

    Raises what the engine raises at submission (`Overloaded`), and `InvalidRequest` for a grammar
    that cannot be compiled; nothing is left running then.
    """

    def __init__(self, engine: Engine, request_id: str, prepared: Prepared) -> None:
        self.request_id = request_id
        self.prepared = prepared
        self._streams: list[TokenStream] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._started_at = time.monotonic()
        self._first_at: float | None = None
        self._last_at = self._started_at
        self._num_tokens: dict[int, int] = {}
        self._num_cached_tokens: dict[int, int] = {}
        self._outcomes: dict[int, str] = {}

    @classmethod
    async def submit(
        cls,
        engine: Engine,
        request_id: str,
        prepared: Prepared,
        salt: bytes = b"",
        receive: Receive | None = None,
        resumption: Resumption | None = None,
    ) -> Generation:
        """`receive` tells when the client leaves: nothing is compiled for it then.

        With a `resumption`, go through what was said before with `replay`.

        Raises `ClientDisconnect`.
        """
        generation = cls(engine, request_id, prepared)
        prompts = prepared.prompts
        if prepared.compile_grammar is not None:
            compiling = prepared.compile_grammar(salt=salt)
            grammar = await (until_disconnect(receive, compiling) if receive else compiling)
            prompts = tuple(
                replace(prompt, params=replace(prompt.params, grammar=grammar))
                for prompt in prompts
            )
        hand_over()
        try:
            for i, prompt in enumerate(prompts):
                for choice in range(prepared.num_choices):
                    index = i * prepared.num_choices + choice
                    stream = engine.submit(
                        request_id if len(prompts) == 1 else f"{request_id}-{i}",
                        prompt.ids,
                        prompt.params,
                        choice=choice,
                        salt=salt,
                        adapter=prepared.adapter,
                        strip_leading_space=prepared.strip_leading_space,
                        priority=prepared.priority,
                        begun=resumption.begun.get(index, UNSAID) if resumption else None,
                    )
                    generation._streams.append(stream)
        except BaseException:
            await generation.aclose()
            raise
        return generation

    @property
    def num_sequences(self) -> int:
        return len(self._streams)

    @property
    def place(self) -> int | None:
        """In the queue, of its sequence that comes first; None when all have come, or before
        anybody has looked."""
        places = [place for stream in self._streams if (place := stream.place) is not None]
        return min(places) if len(places) == len(self._streams) else None

    @property
    def has_begun(self) -> bool:
        """Whether anything has come of it."""
        return bool(self._num_tokens)

    @property
    def num_generated_tokens(self) -> int:
        return sum(self._num_tokens.values())

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens from the prefix cache; the first choice of a prompt speaks for all."""
        first_choices = range(0, self.num_sequences, self.prepared.num_choices)
        return sum(self._num_cached_tokens.get(index, 0) for index in first_choices)

    async def replay(
        self, resumption: Resumption | None, feed: Callable[[int, TokenEvent], object]
    ) -> None:
        """Give `feed` the events of before, in their order; `events` has what comes next.

        Raises `InvalidRequest` where they cannot have been; nothing is left running then.
        """
        try:
            for number, index in enumerate(resumption.order if resumption else (), 1):
                event = await anext(self._streams[index])
                if event.error is not None:
                    raise event.error
                self._note(index, event)
                feed(index, event)
                if number % REPLAYED_AT_ONCE == 0:
                    await asyncio.sleep(0)
        except BaseException:
            await self.aclose()
            raise

    def events(self) -> AsyncGenerator[tuple[int, TokenEvent]]:
        """All events in the order they come, each with the index of its choice.

        Raises `GenerationFailed` when a sequence ends without saying why.
        """
        return self._only() if len(self._streams) == 1 else self._merged()

    async def aclose(self) -> None:
        """Abort what still runs. Safe to call at any time."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for stream in self._streams:
            await stream.aclose()
        self._pumps.clear()

    def log_summary(self) -> None:
        """One line for a request that has ended, without a word of what it said."""
        ttft_s = None if self._first_at is None else self._first_at - self._started_at
        ttft = "-" if ttft_s is None else f"{ttft_s * 1e3:.0f}"
        tpot_s = None
        if self._first_at is not None and self.num_generated_tokens > self.num_sequences:
            num_steps = self.num_generated_tokens / self.num_sequences - 1
            tpot_s = (self._last_at - self._first_at) / num_steps
        tpot = "-" if tpot_s is None else f"{tpot_s * 1e3:.1f}"
        outcomes = [self._outcomes.get(i, "abort") for i in range(self.num_sequences)]
        answered = Answered(
            self.request_id, self.prepared.model, self.prepared.num_prompt_tokens,
            self.num_cached_tokens, self.num_generated_tokens, tuple(outcomes), ttft_s,
        )  # fmt: skip
        note_answer(answered)
        logger.info(
            "%s request=%s model=%s prompt_tokens=%d completion_tokens=%d ttft_ms=%s tpot_ms=%s "
            "finish=%s",
            self.request_id,
            current_request_id(),
            self.prepared.model,
            self.prepared.num_prompt_tokens,
            self.num_generated_tokens,
            ttft,
            tpot,
            ",".join(outcomes),
            extra={
                "about": {
                    **asdict(answered),
                    "tpot_s": tpot_s,
                    "duration_s": time.monotonic() - self._started_at,
                }
            },
        )

    def _note(self, index: int, event: TokenEvent) -> None:
        self._last_at = time.monotonic()
        if self._first_at is None and event.num_generated_tokens:
            self._first_at = self._last_at
        self._num_tokens[index] = event.num_generated_tokens
        self._num_cached_tokens[index] = event.num_cached_tokens
        if event.is_last:
            self._outcomes[index] = event.finish_reason or "error"

    async def _only(self) -> AsyncGenerator[tuple[int, TokenEvent]]:
        if self._outcomes:  # it had ended before it came here
            return
        async for event in self._streams[0]:
            self._note(0, event)
            yield 0, event
            if event.is_last:
                return
        raise _unfinished()

    async def _merged(self) -> AsyncGenerator[tuple[int, TokenEvent]]:
        queue: asyncio.Queue[tuple[int, TokenEvent | Exception]] = asyncio.Queue(MAX_QUEUED_EVENTS)
        self._pumps = [
            asyncio.create_task(_pump(i, stream, queue))
            for i, stream in enumerate(self._streams)
            if i not in self._outcomes
        ]
        num_open = len(self._pumps)
        while num_open:
            index, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            num_open -= event.is_last
            self._note(index, event)
            yield index, event


async def _pump(
    index: int, stream: TokenStream, queue: asyncio.Queue[tuple[int, TokenEvent | Exception]]
) -> None:
    try:
        async for event in stream:
            await queue.put((index, event))
            if event.is_last:
                return
        raise _unfinished()
    except Exception as error:  # a task must not die unheard: the reader of the queue raises it
        await queue.put((index, error))


def _unfinished() -> GenerationFailed:
    return GenerationFailed("the engine ended a sequence without a reason; try again")
