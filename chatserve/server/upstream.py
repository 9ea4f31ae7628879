"""One worker's answer to one request: sent, read as it comes, and what its end means.

Knows one worker; who is asked next is `moves.py`'s business.
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import orjson
from aiohttp.http_exceptions import HttpProcessingError

from chatserve import errors
from chatserve.errors import ChatserveError, NoWorkerAvailable, ShuttingDown, WorkerLost
from chatserve.protocol.control import GIVEN_UP, JOURNAL_HEADER
from chatserve.protocol.leniency import HEADER
from chatserve.server.leases import Lease
from chatserve.server.log_lines import told
from chatserve.server.registry import WorkerRegistry
from chatserve.server.truncation import MESSAGES_HEADER, TOKENS_HEADER
from chatserve.server.units import Reader, UnitReader
from chatserve.server.worker_client import WorkerClient

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PASSED_HEADERS = (
    "content-type",
    "cache-control",
    "x-accel-buffering",
    "retry-after",
    HEADER,
    TOKENS_HEADER,
    MESSAGES_HEADER,
)


@dataclass(frozen=True)
class Asked:
    """A request as it goes to a worker."""

    path: str
    model: str
    body: bytes
    headers: Mapping[str, str]


class NotSent(Exception):
    """The worker could not be reached: nothing of the request has left this process."""


class Lost(Exception):
    """The worker has not answered to the end, and another one could. `error` is what to say if none
    does."""

    def __init__(self, error: ChatserveError) -> None:
        super().__init__(error.message)
        self.error = error


class Paused(Exception):
    """Nothing is to be read now. What has come is still there."""


def passed_headers(upstream: Upstream) -> dict[str, str]:
    """Those of its headers that are the client's business."""
    return {name: upstream.headers[name] for name in PASSED_HEADERS if name in upstream.headers}


class Upstream:
    """A worker's answer, whose headers are there. To be closed; `lease` is released then."""

    def __init__(
        self, response: aiohttp.ClientResponse, lease: Lease, registry: WorkerRegistry
    ) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self.lease = lease
        self._response = response
        self._registry = registry
        self._read: Callable[[], Awaitable[bytes]] = response.content.readany
        lease.on_loss = response.close
        self._closed = _closed(response)
        if self._closed is not None:
            # a connection serves one request after the other: once is enough
            self._closed.remove_done_callback(_retrieve)
            self._closed.add_done_callback(_retrieve)
            self._closed.add_done_callback(self._fail)

    @classmethod
    async def open(
        cls,
        client: WorkerClient,
        registry: WorkerRegistry,
        lease: Lease,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
    ) -> Upstream:
        """Raises `NotSent` or `Lost`; the lease is released then."""
        if lease.loss is not None:
            lease.release()
            raise Lost(lease.loss)
        # bytes over 1 MiB would be written in one go, with a warning
        sending = client.post(lease.worker.base_url, path, data=io.BytesIO(body), headers=headers)
        try:
            return cls(await _unless_lost(lease, _opened(sending)), lease, registry)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            eject(registry, lease, error, is_refusing=True)
            lease.release()
            raise NotSent from error
        except (aiohttp.ClientError, OSError) as error:
            eject(registry, lease, error)
            lease.release()
            raise Lost(_died()) from error
        except BaseException:
            lease.release()
            raise

    @property
    def is_stream(self) -> bool:
        return self._response.content_type.startswith("text/event-stream")

    @property
    def has_journal(self) -> bool:
        return self.is_stream and self.headers.get(JOURNAL_HEADER) == "1"

    async def whole(self) -> bytes:
        """All of it. Raises `Lost`, also when this says that another worker could do better."""
        parts = []
        try:
            while part := await self._read():
                parts.append(part)
        except (aiohttp.ClientError, OSError, HttpProcessingError) as error:
            _forget_frames(error)
            raise self._lost(error) from error
        content = b"".join(parts)
        if self.status >= 500 and self.headers.get(JOURNAL_HEADER) == GIVEN_UP:
            raise Lost(self._given_up(content))
        return content

    async def read(self, reader: Reader) -> bytes:
        """What comes next; nothing at the end. Raises `Lost`."""
        try:
            while chunk := await self._read():
                if data := reader.feed(chunk):
                    return data
        except (aiohttp.ClientError, OSError, HttpProcessingError) as error:
            _forget_frames(error)
            if isinstance(reader, UnitReader) and reader.is_whole:
                return b""  # it only had nothing more to say
            raise self._lost(error) from error
        if reader.is_whole:
            return b""
        if isinstance(reader, UnitReader) and reader.failure is not None:
            raise Lost(self._given_up(reader.failure))
        raise self._lost(aiohttp.ClientPayloadError("the stream ended before its end"))

    def pause(self) -> None:
        """The next `read` raises `Paused`, until `go_on`."""
        self._read = _paused

    def go_on(self) -> None:
        self._read = self._response.content.readany

    def close(self) -> None:
        if self._closed is not None:
            self._closed.remove_done_callback(self._fail)
        # does nothing when the answer has been read to its end: the connection is kept then
        self._response.close()
        self.lease.release()

    def _lost(self, error: Exception) -> Lost:
        if self.lease.loss is not None:
            return Lost(self.lease.loss)
        eject(self._registry, self.lease, error)
        return Lost(_died())

    def _given_up(self, told: bytes) -> ChatserveError:
        error = told_error(told, self.status)
        if not isinstance(error, ShuttingDown | NoWorkerAvailable):
            eject(self._registry, self.lease, error)
        return error

    def _fail(self, _closed: asyncio.Future[None]) -> None:
        """aiohttp's compiled parser forgets to fail the body when a chunk is malformed: reading it
        would then wait for ever, although the connection is closed."""
        if not self._response.content.is_eof():
            self._response.close()


async def _paused() -> bytes:
    raise Paused


def _retrieve(closed: asyncio.Future[None]) -> None:
    """Else asyncio would log that nobody has asked why the connection was lost."""
    if not closed.cancelled():
        closed.exception()


def _forget_frames(error: Exception) -> None:
    """aiohttp raises one and the same exception for every answer that was closed: the frames of all
    who met it would hang on it for ever, and requests with them."""
    error.__traceback__ = None


def _closed(response: aiohttp.ClientResponse) -> asyncio.Future[None] | None:
    protocol = response.connection and response.connection.protocol
    # an empty queue of messages makes a protocol false
    return None if protocol is None else protocol.closed


async def _opened(sending: Any) -> aiohttp.ClientResponse:
    response: aiohttp.ClientResponse = await sending
    return response


async def _unless_lost(lease: Lease, work: Coroutine[Any, Any, Result]) -> Result:
    """Do `work`, which ends when the worker is lost. Raises `Lost` then."""
    task = asyncio.current_task()
    assert task is not None
    lease.on_loss = task.cancel
    try:
        return await work
    except asyncio.CancelledError:
        # a task that is cancelled for another reason, too, has that to obey
        if lease.loss is None or task.uncancel():
            raise
        raise Lost(lease.loss) from None
    finally:
        lease.on_loss = None


def eject(
    registry: WorkerRegistry, lease: Lease, error: Exception, *, is_refusing: bool = False
) -> None:
    worker_id = lease.worker.worker_id
    if registry.eject(worker_id, is_refusing=is_refusing):
        # an error of the HTTP client may quote what the worker sent
        logger.warning("worker %s is ejected: %s", worker_id, told(error))


def _died() -> WorkerLost:
    return WorkerLost("the worker died while it was answering; send the request again")


def told_error(body: bytes, status: int = 0) -> ChatserveError:
    """What a worker says, as if it had been raised here; not all APIs have codes."""
    try:
        error = orjson.loads(body)["error"]
        message, code, param = str(error["message"]), error.get("code"), error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        return _died()
    if not isinstance(code, str):
        unnamed = (NoWorkerAvailable if status == 503 else WorkerLost)(message)
        unnamed.is_foreign = True
        return unnamed
    kinds = {
        kind.code: kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, ChatserveError)
    }
    known = kinds.get(code, WorkerLost)(message)
    known.param = param if isinstance(param, str) else None
    known.is_foreign = True
    return known
