"""A generation on its way out as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

from sse_starlette.event import ServerSentEvent as OutgoingEvent
from sse_starlette.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from chatserve.server.generation import Generation


def ping_comment() -> OutgoingEvent:
    return OutgoingEvent(comment="ping", sep="\n")


class EventStream(EventSourceResponse):
    """Pinged while it is silent, aborted when the client leaves."""

    def __init__(
        self,
        generation: Generation,
        frames: AsyncGenerator[bytes],
        ping_s: float,
        ping: Callable[[], OutgoingEvent] = ping_comment,
    ) -> None:
        super().__init__(frames, ping=ping_s, ping_message_factory=ping)
        self._generation = generation
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._frames.aclose()
            await self._generation.aclose()
            self._generation.log_summary()
