"""The events of one sequence on their way from the engine's thread to whoever awaits them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from chatserve.engine.sequence import TokenEvent

# of one sequence, until whoever reads them has caught up: 256 KiB at most, with 20 logprobs each
MAX_PENDING, MAX_PENDING_LOGPROBS, MAX_PENDING_SCORES = 512, 64, 2


class TokenStream:
    """The events of one sequence, in order; ends after the last one. Closing it early aborts.

    Where more than `max_pending` have not been read, the sequence is held until half of them are.
    """

    def __init__(
        self,
        on_close: Callable[[], None],
        on_pressure: Callable[[bool], None],
        place: Callable[[], int | None],
        *,
        share: bytes = b"",
        max_pending: int = MAX_PENDING,
    ) -> None:
        self.share = share
        self.is_held = False
        self._on_pressure = on_pressure
        self._place = place
        self._max_pending = max_pending
        self.arrived_at = time.monotonic()
        self.spoke_at: float | None = None
        # for measuring: when its first token came, and the last one that another may follow at the
        # engine's own pace
        self.first_at: float | None = None
        self.heard_at: float | None = None
        self.has_paused = False
        self.is_prompt_counted = False
        self._events: deque[TokenEvent] = deque()
        self._arrived = asyncio.Event()
        self._is_done = False
        self._on_close = on_close

    @property
    def place(self) -> int | None:
        """In the queue, 1 is next; None: it is not there, or not known yet."""
        return self._place()

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._arrived.set()
        if len(self._events) > self._max_pending and not (self.is_held or event.is_last):
            self.is_held = True
            self._on_pressure(True)

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenEvent:
        while not self._events:
            if self._is_done:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        if self.is_held and len(self._events) <= self._max_pending // 2:
            self.is_held = False
            self.heard_at, self.has_paused = None, True
            self._on_pressure(False)
        self._is_done = event.is_last
        return event

    async def aclose(self) -> None:
        """Stop listening; a sequence that has not ended is aborted before the next step."""
        self._is_done = True
        self._events.clear()
        self._arrived.set()
        self._on_close()

    async def __aenter__(self) -> TokenStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
