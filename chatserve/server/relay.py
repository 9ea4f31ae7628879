"""One request to one worker: bytes through, cancelled upstream when the client leaves.

Knows nothing of the JSON it carries. A stream is passed on in whole frames, so that an error event
can follow when the worker dies in the middle of one; only of a very long frame not all is held.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chatserve.errors import ChatserveError, WorkerLost
from chatserve.protocol.control import bearer
from chatserve.protocol.leniency import HEADER
from chatserve.server.cache_salt import header_for_worker
from chatserve.server.disconnect import disconnected, until_disconnect
from chatserve.server.error_response import error_event
from chatserve.server.registry import Lease, Worker, WorkerRegistry
from chatserve.server.request_id import HEADER as REQUEST_ID_HEADER
from chatserve.server.request_id import current_request_id
from chatserve.server.truncation import MESSAGES_HEADER, TOKENS_HEADER

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
# under uvicorn's 5 s, so that a kept connection is never used while the worker closes it
KEEPALIVE_S = 2.0
FRAME_ENDS = (b"\n\n", b"\r\n\r\n")
MAX_HELD_BYTES = 1024 * 1024
# of an end of a frame that may be cut
_MAX_CUT = max(map(len, FRAME_ENDS)) - 1
PASSED_HEADERS = (
    "content-type",
    "cache-control",
    "x-accel-buffering",
    "retry-after",
    HEADER,
    TOKENS_HEADER,
    MESSAGES_HEADER,
)


def open_session() -> aiohttp.ClientSession:
    """The controller's HTTP client: no limit on time or number, no redirects, no proxies."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
    )


class NotSent(Exception):
    """The worker could not be reached: nothing of the request has left this process."""


class Relay:
    """Dispatches requests to the workers of `registry`."""

    def __init__(
        self, registry: WorkerRegistry, session: aiohttp.ClientSession, control_token: str
    ) -> None:
        self._registry = registry
        self._session = session
        self._token = control_token
        self._headers = {
            "Content-Type": "application/json",
            # bytes go through as they are: nothing here could decompress them for the client
            "Accept-Encoding": "identity",
            **bearer(control_token),
        }

    async def forward(self, request: Request, model: str, body: bytes) -> Response:
        """Send `body` to a worker for `model` and pass its answer on.

        Raises `ModelNotFound`, `NoWorkerAvailable`, or `WorkerLost` when the worker died before the
        first byte of its answer; `ClientDisconnect` when the client left before it.
        """
        while True:
            lease = self._registry.pick(model)
            try:
                return await until_disconnect(request.receive, self._open(request, body, lease))
            except NotSent:
                # another worker may take the request as if it were the first
                lease.release()
            except BaseException:
                lease.release()
                raise

    async def forward_again(self, request: Request, stream: Response, body: bytes) -> Response:
        """Send `body` to the worker that `stream` comes from, and pass its answer on.

        Raises `WorkerLost`.
        """
        assert isinstance(stream, RelayedStream)
        with Lease(stream.worker) as lease:
            try:
                return await until_disconnect(request.receive, self._open(request, body, lease))
            except NotSent as error:
                raise self._lost(stream.worker.worker_id, error) from error

    async def _open(self, request: Request, body: bytes, lease: Lease) -> Response:
        worker = lease.worker
        try:
            upstream = await self._session.post(
                worker.base_url + request.url.path,
                # bytes over 1 MiB would be written in one go, with a warning
                data=io.BytesIO(body),
                headers=self._headers
                | header_for_worker(request.headers, self._token)
                | {REQUEST_ID_HEADER: current_request_id()},
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            self._note_loss(worker.worker_id, error)
            raise NotSent from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._lost(worker.worker_id, error) from error
        try:
            return await self._answer(upstream, lease)
        except BaseException:
            upstream.close()
            raise

    async def _answer(self, upstream: aiohttp.ClientResponse, lease: Lease) -> Response:
        headers = {n: upstream.headers[n] for n in PASSED_HEADERS if n in upstream.headers}
        try:
            if not upstream.content_type.startswith("text/event-stream"):
                content = b"".join([chunk async for chunk in _chunks(upstream)])
                lease.release()
                return Response(content, upstream.status, headers)
            frames = whole_frames(_chunks(upstream))
            # the headers go out with the first frame, so that until then a status can tell of death
            first = await anext(frames, b"")
        except (aiohttp.ClientError, OSError) as error:
            raise self._lost(lease.worker.worker_id, error) from error
        return RelayedStream(upstream, headers, first, frames, lease, on_loss=self._lost)

    def _lost(self, worker_id: str, error: Exception) -> WorkerLost:
        self._note_loss(worker_id, error)
        return WorkerLost("the worker died while it was answering; send the request again")

    def _note_loss(self, worker_id: str, error: Exception) -> None:
        logger.warning("worker %s is ejected: %s", worker_id, str(error) or type(error).__name__)
        self._registry.eject(worker_id)


class RelayedStream(Response):
    """A worker's stream on its way to the client."""

    def __init__(
        self,
        upstream: aiohttp.ClientResponse,
        headers: Mapping[str, str],
        first: bytes,
        frames: AsyncGenerator[bytes],
        lease: Lease,
        *,
        on_loss: Callable[[str, Exception], ChatserveError],
    ) -> None:
        self.status_code = upstream.status
        self.background = None
        self.init_headers(headers)
        self._upstream = upstream
        self._first = first
        self._frames = frames
        self._lease = lease
        self._on_loss = on_loss
        self._is_client_gone = False

    @property
    def worker(self) -> Worker:
        """Where it comes from."""
        return self._lease.worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(self._close_on_disconnect(receive))
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await self._pass_on(lambda data: send(_body(data)), scope["path"])
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            # does nothing when the answer has been read to its end: the connection is kept then
            self._upstream.close()
            self._lease.release()
            await self._frames.aclose()

    async def _pass_on(self, write: Callable[[bytes], Awaitable[None]], path: str) -> None:
        frames = self._first
        try:
            await write(frames)
            async for frames in self._frames:
                await write(frames)
        except (aiohttp.ClientError, OSError) as error:
            if not self._is_client_gone:
                loss = self._on_loss(self._lease.worker.worker_id, error)
                # the beginning of a very long frame is out: the error needs one of its own
                cut = b"" if frames.endswith(FRAME_ENDS) else b"\n\n"
                await write(cut + error_event(loss, path, frames))

    async def _close_on_disconnect(self, receive: Receive) -> None:
        await disconnected(receive)
        self._is_client_gone = True
        self._upstream.close()


def _body(data: bytes) -> dict[str, object]:
    return {"type": "http.response.body", "body": data, "more_body": True}


async def _chunks(upstream: aiohttp.ClientResponse) -> AsyncGenerator[bytes]:
    """The body as it comes. Raises `aiohttp.ClientError` when it ends before its end."""
    with _failing_with_its_connection(upstream):
        try:
            async for chunk in upstream.content.iter_any():
                yield chunk
        except HttpProcessingError as error:
            raise aiohttp.ClientPayloadError(str(error)) from error


@contextlib.contextmanager
def _failing_with_its_connection(upstream: aiohttp.ClientResponse) -> Iterator[None]:
    """aiohttp's compiled parser forgets to fail the body when a chunk is malformed: reading it
    would then wait for ever, although the connection is closed."""
    protocol = upstream.connection and upstream.connection.protocol
    # an empty queue of messages makes a protocol false
    closed = None if protocol is None else protocol.closed
    if closed is None:
        yield
        return

    def fail(closed: asyncio.Future[None]) -> None:
        if not closed.cancelled():
            closed.exception()
        if not upstream.content.is_eof():
            upstream.close()

    closed.add_done_callback(fail)
    try:
        yield
    finally:
        closed.remove_done_callback(fail)


async def whole_frames(chunks: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The same bytes, cut only where a frame ends; a frame that is never finished is dropped.

    Of a frame that is larger than what is held here, the beginning goes on before its end is there.
    """
    held = bytearray()
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            if not held and chunk.endswith(FRAME_ENDS):
                yield chunk
                continue
            # what was held before has no end in it
            start = max(0, len(held) - _MAX_CUT)
            held += chunk
            end = max(_end_of(mark, held, start) for mark in FRAME_ENDS)
            if not end and len(held) > MAX_HELD_BYTES:
                end = len(held) - _MAX_CUT
            if end:
                yield bytes(held[:end])
                del held[:end]


def _end_of(mark: bytes, data: bytearray, start: int) -> int:
    """Where the last `mark` ends, 0 if there is none."""
    place = data.rfind(mark, start)
    return 0 if place < 0 else place + len(mark)
