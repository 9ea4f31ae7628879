"""One request to a worker: bytes through, cancelled there when the client leaves.

When the worker is lost, another one goes on with the request, and the client need not know. Reads
nothing of the JSON it carries. A stream is passed on in whole frames, so that an error event can
follow when there is nobody to go on with it; only of a very long frame not all is held.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from chatserve.errors import ChatserveError, NoWorkerAvailable, WorkerLost
from chatserve.protocol.control import JOURNAL_HEADER, RESUME_PATH, bearer
from chatserve.protocol.leniency import HEADER
from chatserve.protocol.sse import PING
from chatserve.server.cache_salt import header_for_worker
from chatserve.server.controller_door import takes_place
from chatserve.server.disconnect import disconnected, until_disconnect
from chatserve.server.error_response import error_event
from chatserve.server.leases import Lease, Worker
from chatserve.server.moves import Moves, ResumePolicy
from chatserve.server.registry import WorkerRegistry
from chatserve.server.request_id import HEADER as REQUEST_ID_HEADER
from chatserve.server.request_id import current_request_id
from chatserve.server.stream_memory import MemoryBudget, StreamMemory
from chatserve.server.truncation import MESSAGES_HEADER, TOKENS_HEADER
from chatserve.server.units import FrameReader, Reader, UnitReader
from chatserve.server.upstream import Lost, NotSent, Paused, Upstream, told_error
from chatserve.server.worker_client import WorkerClient

logger = logging.getLogger(__name__)

PASSED_HEADERS = (
    "content-type",
    "cache-control",
    "x-accel-buffering",
    "retry-after",
    HEADER,
    TOKENS_HEADER,
    MESSAGES_HEADER,
)
# encoding more takes longer than another stream should wait for its next token
MAX_INLINE_BYTES = 64 * 1024
RETRY_AFTER_S = 1.0
OVERLOADED = 429


@dataclass(frozen=True)
class Asked:
    """A request as it goes to a worker."""

    path: str
    model: str
    body: bytes
    headers: Mapping[str, str]


class Relay:
    """Dispatches requests to the workers of `registry`."""

    def __init__(
        self,
        registry: WorkerRegistry,
        client: WorkerClient,
        control_token: str,
        policy: ResumePolicy,
    ) -> None:
        self.policy = policy
        self._registry = registry
        self._client = client
        self._token = control_token
        self._budget = MemoryBudget()
        self._headers = {
            "Content-Type": "application/json",
            # bytes go through as they are: nothing here could decompress them for the client
            "Accept-Encoding": "identity",
            **bearer(control_token),
            **({JOURNAL_HEADER: "1"} if policy.is_on else {}),
        }

    async def forward(self, request: Request, model: str, body: bytes) -> Response:
        """Send `body` to a worker for `model` and pass its answer on.

        Raises `ModelNotFound`, `NoWorkerAvailable`, or what a worker was lost of before the first
        byte of its answer; `ClientDisconnect` when the client left before it; `Overloaded` when no
        worker has room. One that is full does not speak for the others.
        """
        needs_room = takes_place(request.scope)
        if needs_room:
            self._registry.check_room(model)
        asked = self._asked(request, model, body)
        return await until_disconnect(request.receive, self._forward(asked, needs_room))

    async def forward_again(self, request: Request, stream: Response, body: bytes) -> Response:
        """Send `body` to the worker that `stream` comes from, and pass its answer on.

        Raises `WorkerLost`, or `NoWorkerAvailable` while the stream moves.
        """
        assert isinstance(stream, RelayedStream)
        worker = stream.worker
        if worker is None:
            raise NoWorkerAvailable("the answer moves to another worker; try again in a moment")
        asked = self._asked(request, "", body)
        try:
            return await until_disconnect(request.receive, self._whole(asked, Lease(worker)))
        except NotSent as error:
            raise told_error(b"") from error
        except Lost as lost:
            raise lost.error from lost

    async def go_on(self, asked: Asked, moves: Moves, memory: StreamMemory) -> Upstream:
        """The rest of a stream, from another worker. Raises what is to end it instead."""
        fingerprint = _fingerprint(memory)
        while True:
            lease = await moves.next(fingerprint)
            try:
                return await self._go_on_at(lease, asked, moves, memory)
            except NotSent:
                continue
            except Lost as lost:
                moves.lose(lost.error)

    async def go_on_now(self, asked: Asked, moves: Moves, memory: StreamMemory) -> Upstream | None:
        """The rest of a stream, from a worker that consents at once; None where nobody does.

        Raises what a worker was lost of too often over it.
        """
        while (lease := moves.pick_now(_fingerprint(memory))) is not None:
            try:
                return await self._go_on_at(lease, asked, moves, memory)
            except NotSent:
                continue
            except Lost as lost:
                moves.lose(lost.error)
        return None

    def _asked(self, request: Request, model: str, body: bytes) -> Asked:
        headers = (
            self._headers
            | header_for_worker(request.headers, self._token)
            | {REQUEST_ID_HEADER: current_request_id()}
        )
        return Asked(request.url.path, model, body, headers)

    async def _forward(self, asked: Asked, needs_room: bool) -> Response:
        if needs_room:
            # of those that came in one turn of the loop nobody had a lease when all were let in
            self._registry.check_room(asked.model)
        moves = Moves(self._registry, asked.model, self.policy)
        refusal: Response | None = None
        while True:
            try:
                lease = await moves.next()
            except NoWorkerAvailable:
                if refusal is None:
                    raise
                return refusal
            try:
                response = await self._answer(asked, lease, moves)
                if response.status_code != OVERLOADED or moves.has_lost:
                    return response
                # its queue is full; another worker's may not be
                refusal = _sooner(refusal, response)
                moves.put_off(lease.worker.worker_id, _retry_after_s(response))
            except NotSent:
                continue  # another worker may take the request as if it were the first
            except Lost as lost:
                moves.lose(lost.error)

    async def _open(self, asked: Asked, lease: Lease) -> Upstream:
        return await Upstream.open(
            self._client, self._registry, lease, asked.path, asked.body, asked.headers
        )

    async def _whole(self, asked: Asked, lease: Lease) -> Response:
        upstream = await self._open(asked, lease)
        try:
            return Response(await upstream.whole(), upstream.status, _passed(upstream))
        finally:
            upstream.close()

    async def _answer(self, asked: Asked, lease: Lease, moves: Moves) -> Response:
        upstream = await self._open(asked, lease)
        memory = StreamMemory(self._budget, asked.body) if upstream.has_journal else None
        try:
            if not upstream.is_stream:
                response = Response(await upstream.whole(), upstream.status, _passed(upstream))
                upstream.close()
                return response
            reader = FrameReader() if memory is None else UnitReader(memory)
            # the headers go out with the first frame, so that until then a status can tell of death
            first = await upstream.read(reader)
        except BaseException:
            upstream.close()
            if memory is not None:
                memory.forget()
            raise
        return RelayedStream(self, asked, moves, upstream, reader, memory, first)

    async def _go_on_at(
        self, lease: Lease, asked: Asked, moves: Moves, memory: StreamMemory
    ) -> Upstream:
        """Raises `NotSent` where another worker is to be asked, and `Lost`."""
        is_begun = bool(memory.start)
        if is_begun:
            upstream = await self._resume(asked, lease, memory)
        else:
            upstream = await self._open(asked, lease)
        try:
            if upstream.has_journal:
                return upstream
            if upstream.is_stream and not is_begun:
                memory.forget()
                return upstream
            content = b"" if upstream.is_stream else await upstream.whole()
            upstream.close()
            if is_begun and (upstream.is_stream or upstream.status == 409):
                logger.info("%s cannot go on: %s", lease.worker.base_url, told_error(content))
                moves.rule_out(lease.worker.worker_id)
                raise NotSent
            if upstream.status in (429, 503):
                moves.put_off(lease.worker.worker_id, _retry_after_s(upstream))
                raise NotSent
            raise told_error(content, upstream.status)
        except BaseException:
            upstream.close()
            raise

    async def _resume(self, asked: Asked, lease: Lease, memory: StreamMemory) -> Upstream:
        def encode() -> bytes:
            fields = {"path": asked.path, "body": asked.body.decode(), "journal": journal.decode()}
            return orjson.dumps(fields)

        try:
            journal = memory.journal
            is_short = len(journal) + len(asked.body) <= MAX_INLINE_BYTES
            body = encode() if is_short else await asyncio.to_thread(encode)
        except BaseException:
            lease.release()
            raise
        logger.info(
            "a stream goes on at %s, request=%s",
            lease.worker.base_url, asked.headers[REQUEST_ID_HEADER],
        )  # fmt: skip
        return await Upstream.open(
            self._client, self._registry, lease, RESUME_PATH, body, asked.headers
        )


class RelayedStream(Response):
    """A worker's stream on its way to the client, and what another one makes of it."""

    def __init__(
        self,
        relay: Relay,
        asked: Asked,
        moves: Moves,
        upstream: Upstream,
        reader: Reader,
        memory: StreamMemory | None,
        first: bytes,
    ) -> None:
        self.status_code = upstream.status
        self.background = None
        self.init_headers(_passed(upstream))
        self._relay = relay
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
                send, self._relay.go_on_now(self._asked, self._moves, memory)
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
            send, self._relay.go_on(self._asked, self._moves, memory), at_once=True
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
            while not (await asyncio.wait({going_on}, timeout=self._relay.policy.ping_s))[0]:
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


def _passed(upstream: Upstream) -> dict[str, str]:
    return {name: upstream.headers[name] for name in PASSED_HEADERS if name in upstream.headers}


def _body(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


def _fingerprint(memory: StreamMemory) -> str | None:
    """Of the numbers that began the stream; none where none has begun."""
    if not memory.start:
        return None
    return str(orjson.loads(memory.start[len(b":s ") :])["fingerprint"])


def _sooner(first: Response | None, second: Response) -> Response:
    """Of two refusals the one that says to come back earlier."""
    if first is None or _retry_after_s(second) < _retry_after_s(first):
        return second
    return first


def _retry_after_s(answer: Upstream | Response) -> float:
    given = answer.headers.get("retry-after", "")
    return float(given) if given.isascii() and given.isdigit() else RETRY_AFTER_S
