"""One request to a worker: bytes through, cancelled there when the client leaves.

When the worker is lost, another one goes on with the request, and the client need not know. Reads
nothing of the JSON it carries. A stream is passed on in whole frames, so that an error event can
follow when there is nobody to go on with it (`relayed_stream.py`).
"""

from __future__ import annotations

import asyncio
import logging

import orjson
from starlette.requests import Request
from starlette.responses import Response

from chatserve.errors import NoWorkerAvailable
from chatserve.protocol.control import JOURNAL_HEADER, RESUME_PATH, bearer
from chatserve.server.cache_salt import header_for_worker
from chatserve.server.controller_door import takes_place
from chatserve.server.disconnect import until_disconnect
from chatserve.server.leases import Lease
from chatserve.server.moves import Moves, ResumePolicy
from chatserve.server.outcome import current_trace_headers, note_model
from chatserve.server.registry import WorkerRegistry
from chatserve.server.relayed_stream import RelayedStream
from chatserve.server.request_id import HEADER as REQUEST_ID_HEADER
from chatserve.server.request_id import current_request_id
from chatserve.server.stream_memory import MemoryBudget, StreamMemory
from chatserve.server.units import FrameReader, UnitReader
from chatserve.server.upstream import Asked, Lost, NotSent, Upstream, passed_headers, told_error
from chatserve.server.worker_client import WorkerClient

logger = logging.getLogger(__name__)

# encoding more takes longer than another stream should wait for its next token
MAX_INLINE_BYTES = 64 * 1024
RETRY_AFTER_S = 1.0
OVERLOADED = 429


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
            | dict(current_trace_headers())
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
            note_model(asked.model)
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
            return Response(await upstream.whole(), upstream.status, passed_headers(upstream))
        finally:
            upstream.close()

    async def _answer(self, asked: Asked, lease: Lease, moves: Moves) -> Response:
        upstream = await self._open(asked, lease)
        memory = StreamMemory(self._budget, asked.body) if upstream.has_journal else None
        try:
            if not upstream.is_stream:
                response = Response(
                    await upstream.whole(), upstream.status, passed_headers(upstream)
                )
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
        return RelayedStream(
            self, self.policy.ping_s, asked, moves, upstream, reader, memory, first
        )

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
