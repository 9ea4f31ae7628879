"""A generation on its way out as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

import anyio
from sse_starlette.event import ServerSentEvent as OutgoingEvent
from sse_starlette.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from chatserve.protocol.sse import encode_place
from chatserve.server.generation import Generation

FIRST_PLACE_S = 0.25
PLACE_S = 1.0


def ping_comment() -> OutgoingEvent:
    return OutgoingEvent(comment="ping", sep="\n")


class EventStream(EventSourceResponse):
    """Pinged while it is silent, aborted when the client leaves.

    While it waits for its turn, its place in the queue goes out when it changes.
    """

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
        self._ping_s = ping_s
        self._encoded_ping = ping().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._frames.aclose()
            await self._generation.aclose()
            self._generation.log_summary()

    async def _ping(self, send: Send) -> None:
        # its task is there in any case: no other looks at the place
        if self._ping_s:
            await self._tell_place(send)
        await super()._ping(send)

    async def _tell_place(self, send: Send) -> None:
        """Until something has come of it."""
        told: int | None = None
        silent_s = 0.0
        pause_s = min(FIRST_PLACE_S, self._ping_s)
        while self.active and not self._generation.has_begun:
            await anyio.sleep(pause_s)
            silent_s += pause_s
            pause_s = min(PLACE_S, self._ping_s)
            place = self._generation.place
            if place is not None and place != told:
                told = place
                frame = encode_place(place)
            elif silent_s >= self._ping_s:
                frame = self._encoded_ping
            else:
                continue
            silent_s = 0.0
            await self._send(send, frame)

    async def _send(self, send: Send, frame: bytes) -> None:
        async with self._send_lock:
            if self.active and not self._generation.has_begun:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
