"""A worker's stream on its way to the client, and what another worker makes of it.

In whole frames, so that an error event can follow; only of a very long frame not all is held. Picks
no worker: that is the relay's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from chatserve.errors import ChatserveError, WorkerLost
from chatserve.protocol.sse import PING
from chatserve.server.disconnect import disconnected
from chatserve.server.error_response import error_event
from chatserve.server.leases import Worker
from chatserve.server.moves import Moves
from chatserve.server.stream_memory import StreamMemory
from chatserve.server.units import FrameReader, Reader, UnitReader
from chatserve.server.upstream import Asked, Lost, Paused, Upstream, passed_headers

logger = logging.getLogger(__name__)


class Successors(Protocol):
    """Who finds the worker that goes on with a stream."""

    async def go_on(self, asked: Asked, moves: Moves, memory: StreamMemory) -> Upstream:
        """The rest of a stream, from another worker. Raises what is to end it instead."""

    async def go_on_now(self, asked: Asked, moves: Moves, memory: StreamMemory) -> Upstream | None:
        """The same from a worker that consents at once; None where nobody does."""


class RelayedStream(Response):
    """A worker's stream on its way to the client, and what another one makes of it."""

    def __init__(
        self,
        successors: Successors,
        ping_s: float,
        asked: Asked,
        moves: Moves,
        upstream: Upstream,
        reader: Reader,
        memory: StreamMemory | None,
        first: bytes,
    ) -> None:
        self.status_code = upstream.status
        self.background = None
        self.init_headers(passed_headers(upstream))
        self._successors = successors
        self._ping_s = ping_s
        self._asked = asked
        self._moves = moves
        self._upstream: Upstream | None = None
        self._reader = reader
        self._memory = memory
        self._last = first
        self._place = 0
        self._is_client_gone = False
        self._stays = False
        self._retry: asyncio.TimerHandle | None = None
        self._pumping: Coroutine[Any, Any, None] | None = None
        self._task: asyncio.Task[Any] | None = None
        self._is_called_away = False
        self._going_on: asyncio.Future[Upstream | None] | None = None
        self._come_from(upstream)

    @property
    def worker(self) -> Worker | None:
        """Where it comes from; None while it moves."""
        return None if self._upstream is None else self._upstream.lease.worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(self._leave(receive))
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await self._pass_on(send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            self._close_upstream()
            if self._memory is not None:
                self._memory.forget()

    async def _leave(self, receive: Receive) -> None:
        await disconnected(receive)
        self._is_client_gone = True
        if self._upstream is not None:
            self._upstream.lease.lose(WorkerLost("nobody reads its answer any more"))
        if self._going_on is not None:
            self._going_on.cancel()

    async def _pass_on(self, send: Send) -> None:
        try:
            if self._last:
                await send(_body(self._last))
            while not self._is_client_gone:
                try:
                    if await self._has_pumped(send):
                        return
                    if not self._is_client_gone:
                        await self._hand_over(send)
                except Lost as lost:
                    if not self._is_client_gone:
                        await self._move(send, lost.error)
        except ChatserveError as error:
            # the beginning of a very long frame is out: the error needs one of its own
            cut = b"\n\n" if self._reader.is_inside else b""
            await send(_body(cut + error_event(error, self._asked.path, self._last)))

    async def _has_pumped(self, send: Send) -> bool:
        """False when another worker is to be asked before the end. Raises `Lost`."""
        self._task = task = asyncio.current_task()
        assert task is not None
        self._pumping = self._pump(send)
        try:
            await self._pumping
            return True
        except Paused:
            return False
        except asyncio.CancelledError:
            # a task that is cancelled for another reason, too, has that to obey
            if not self._is_called_away or task.uncancel():
                raise
            return False
        finally:
            self._is_called_away = False
            self._pumping = None

    def _call_away(self) -> None:
        """Its worker goes, and another one is there: pass on no more, until that one was asked."""
        if self._upstream is None or self._stays or self._is_called_away:
            return
        self._upstream.pause()
        # what is being sent is sent to its end; who waits for more does not know when there is any
        waits_for = getattr(self._pumping, "cr_await", None)
        if self._task is not None and getattr(waits_for, "cr_code", None) is Upstream.read.__code__:
            self._is_called_away = True
            self._task.cancel()

    async def _hand_over(self, send: Send) -> None:
        """Let another worker go on if one consents, and else the one that would rather go."""
        upstream, memory = self._upstream, self._memory
        assert upstream is not None
        if memory is None or not memory.is_kept:
            upstream.go_on()
            return
        try:
            successor = await self._pinging(
                send, self._successors.go_on_now(self._asked, self._moves, memory)
            )
        except ChatserveError as error:
            logger.info("a stream stays where it is: %s", error.message)
            self._stays = True
            successor = None
        if successor is not None:
            self._close_upstream()
            self._go_on_from(successor, memory)
            return
        if (seconds := self._moves.next_try_s) is not None:
            if self._retry is not None:
                self._retry.cancel()
            self._retry = asyncio.get_running_loop().call_later(seconds, upstream.lease.send_on)
        self._moves.stay()
        upstream.go_on()

    async def _pump(self, send: Send) -> None:
        upstream, reader = self._upstream, self._reader
        assert upstream is not None
        while data := await upstream.read(reader):
            await send(_body(data))
            # the number of an event is at its end, of which a piece says nothing
            if not reader.is_inside:
                self._last = data

    async def _move(self, send: Send, loss: ChatserveError) -> None:
        """Let another worker go on. Raises what is to be said when there is none."""
        upstream, memory = self._upstream, self._memory
        assert upstream is not None
        self._close_upstream()
        if memory is None or not memory.is_kept:
            raise loss
        self._moves.lose(loss, has_moved_on=memory.has_tokens_since(self._place))
        successor = await self._pinging(
            send, self._successors.go_on(self._asked, self._moves, memory), at_once=True
        )
        if successor is not None:
            self._go_on_from(successor, memory)

    async def _pinging(
        self, send: Send, work: Coroutine[Any, Any, Upstream | None], *, at_once: bool = False
    ) -> Upstream | None:
        """Do `work` while the client is told that it is still there; None when that has left."""
        going_on = asyncio.ensure_future(work)
        self._going_on = going_on
        try:
            if at_once:
                await send(_body(PING))
            while not (await asyncio.wait({going_on}, timeout=self._ping_s))[0]:
                await send(_body(PING))
        except BaseException:
            going_on.cancel()
            [late] = await asyncio.gather(going_on, return_exceptions=True)
            if late is not None and not isinstance(late, BaseException):
                late.close()  # it has come for nobody
            raise
        finally:
            self._going_on = None
        return None if going_on.cancelled() else going_on.result()

    def _go_on_from(self, upstream: Upstream, memory: StreamMemory) -> None:
        self._reader = UnitReader(memory) if upstream.has_journal else FrameReader()
        self._place = memory.num_bytes
        self._come_from(upstream)

    def _come_from(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._moves.arrive()
        upstream.lease.can_move = self._can_move
        upstream.lease.on_sent_on = self._call_away

    def _can_move(self) -> bool:
        memory = self._memory
        return memory is not None and memory.is_kept and bool(memory.start)

    def _close_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None


def _body(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}
