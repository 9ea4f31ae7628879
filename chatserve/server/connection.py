"""One client's connection: how long and how large the head of a request may be, and how many come.

uvicorn gives whoever connects all the time there is, and what it wraps begins only behind the
headers: so its protocol is bounded here. Knows bytes, clocks and the shape of an error; no route.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from http import HTTPStatus
from ssl import SSLContext
from typing import Any, cast

import uvicorn
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from chatserve.errors import (
    ChatserveError,
    HeadersTooLarge,
    HeadersTooSlow,
    InvalidRequest,
    Overloaded,
)
from chatserve.server import request_id
from chatserve.server.error_response import error_response
from chatserve.server.handshakes import MAX_HANDSHAKES
from chatserve.server.slow_reader import DEFAULT_TIMEOUT_S, SlowReader

logger = logging.getLogger(__name__)

HEADER_TIMEOUT_S = 10.0
# the edge answers a slow body after 30 s; this is for one that nobody reads any more
BODY_TIMEOUT_S = 35.0
REFUSAL_TIMEOUT_S = 2.0
LINGER_S = 1.0
REST_S = 1.0
MAX_HEADERS = 100
HTTP_VERSIONS = ("1.0", "1.1")
MAX_HEADER_BYTES = 32 * 1024
MAX_DISCARDED_BYTES = 1024 * 1024
DEFAULT_CONNECTIONS = 256
# its own, a worker's, and that of one who is told to come back
FILES_PER_CONNECTION = 3
RESERVED_FILES = 64


def within_file_limit(wished: int, tls: SSLContext | None = None) -> int:
    """How many of `wished` connections this process may hold, with a worker's behind each, and
    with `tls` handshakes beside them.

    Raises its soft limit on open files as far as it may.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reserved = RESERVED_FILES + (MAX_HANDSHAKES if tls else 0)
    needed = reserved + FILES_PER_CONNECTION * wished
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wished
    fitting = max(1, (soft - reserved) // FILES_PER_CONNECTION)
    logger.warning(
        "at most %d connections at once instead of %d: this process may open %d files (ulimit -n)",
        fitting, wished, soft,
    )  # fmt: skip
    return fitting


class Connections:
    """The connections of one listener.

    Over `limit` the one that has rested longest makes room: it is between two requests, or has not
    sent all of a head. Where all are at work, a new one is told to come back.
    """

    def __init__(
        self, limit: int = DEFAULT_CONNECTIONS, write_timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """`write_timeout_s`: see `SlowReader`."""
        self.limit = limit
        self.write_timeout_s = write_timeout_s
        self._admitted: set[Connection] = set()
        self._refused: set[Connection] = set()
        # in the order in which they began to rest
        self._resting: dict[Connection, float] = {}

    def __len__(self) -> int:
        return len(self._admitted) + len(self._refused)

    def admit(self, connection: Connection, now: float) -> bool:
        """Whether `connection` may ask; room is made for it where there is some to make."""
        if len(self._admitted) >= self.limit and not self._make_room(now):
            self._refused.add(connection)
            return False
        self._admitted.add(connection)
        self.rest(connection, now)
        return True

    def rest(self, connection: Connection, now: float) -> None:
        if connection in self._admitted:
            self._resting[connection] = now

    def work(self, connection: Connection) -> None:
        self._resting.pop(connection, None)

    def forget(self, connection: Connection) -> None:
        self._resting.pop(connection, None)
        self._admitted.discard(connection)
        self._refused.discard(connection)

    @property
    def is_flooded(self) -> bool:
        """Whether there are too many even to be told so."""
        return len(self._refused) > self.limit

    def _make_room(self, now: float) -> bool:
        # all rest for a moment before their first byte has been read
        oldest = next(iter(self._resting), None)
        if oldest is None or now - self._resting[oldest] < REST_S:
            return False
        oldest.end()
        self.forget(oldest)
        return True


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with an end to its patience."""

    transport: asyncio.Transport

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        connections: Connections,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._all = connections
        self._reader = SlowReader(self.loop, connections.write_timeout_s)
        self._clock: asyncio.TimerHandle | None = None
        self._clock_is_for = ""
        # what the parser is in: the head of a request that has begun or not, or its body
        self._is_in_head = True
        self._has_begun = False
        self._has_moved = False
        self._num_headers = 0
        self._num_header_bytes = 0
        self._num_unparsed_bytes = 0
        self._num_discarded_bytes = 0
        self._fault: ChatserveError = InvalidRequest(
            "this is no valid HTTP/1.1 request; check its line and headers"
        )
        self._is_deaf = False
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._is_refused = not self._all.admit(self, self.loop.time())
        if not self._is_refused:
            self._set_clock("head", HEADER_TIMEOUT_S)
        elif self._all.is_flooded:
            transport.abort()
        else:
            self.app = _refuse
            self._set_clock("refusal", REFUSAL_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.forget(self)
        self._stop_clock()
        self._reader.resume()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader.pause(self.transport)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reader.resume()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            self._num_discarded_bytes += len(data)
            if self._num_discarded_bytes > MAX_DISCARDED_BYTES:
                self.end()
            return
        self._has_moved = False
        super().data_received(data)
        if not self._reads_on():
            return
        # of a head whose end is not in sight, the parser keeps all
        self._num_unparsed_bytes = 0 if self._has_moved else self._num_unparsed_bytes + len(data)
        if self._is_in_head and self._num_unparsed_bytes > MAX_HEADER_BYTES:
            self._reject(_too_large())
        elif not self._is_refused:
            self._wind_clock()

    def end(self) -> None:
        """Close at once: nothing is under way."""
        self._is_deaf = True
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What the parser cannot read, or one of ours could not."""
        self._reject(self._fault)

    def _unsupported_upgrade_warning(self) -> None:
        """A request to speak something else is answered in HTTP, and is nobody's trouble."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_begun = self._has_moved = True
        self._num_headers = self._num_header_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if (version := self.parser.get_http_version()) not in HTTP_VERSIONS:
            self._fault = InvalidRequest(f"HTTP/{version} is not spoken here; send HTTP/1.1")
            raise self._fault
        self._has_moved = True
        self._is_in_head = False
        if not self._is_refused:
            self._stop_clock()
        self._all.work(self)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._has_moved = True
        self._is_in_head = True
        self._has_begun = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:
            self._all.rest(self, self.loop.time())

    def _reads_on(self) -> bool:
        return not (self._is_deaf or self.transport.is_closing())

    def _is_answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _count(self, num_bytes: int) -> None:
        """Raises where the parser makes an end of it."""
        self._num_header_bytes += num_bytes
        if self._num_headers > MAX_HEADERS or self._num_header_bytes > MAX_HEADER_BYTES:
            self._fault = _too_large()
            raise self._fault

    def _wind_clock(self) -> None:
        """A clock for what is not complete; it goes on where nothing has come but more of it."""
        if not self._is_in_head:
            kind, seconds = "body", BODY_TIMEOUT_S
        elif self._has_begun or not self._has_moved:
            kind, seconds = "head", HEADER_TIMEOUT_S
        else:
            self._stop_clock()
            return
        if self._clock is None or self._clock_is_for != kind:
            self._set_clock(kind, seconds)

    def _set_clock(self, kind: str, seconds: float) -> None:
        self._stop_clock()
        self._clock_is_for = kind
        self._clock = self.loop.call_later(seconds, self._ring)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _ring(self) -> None:
        self._clock = None
        if self._clock_is_for == "head" and self._has_begun:
            self._reject(
                HeadersTooSlow(
                    f"the headers were not complete after {HEADER_TIMEOUT_S:g} s; send them at once"
                ),
                linger_s=0,
            )
        else:
            self.end()

    def _reject(self, error: ChatserveError, *, linger_s: float = LINGER_S) -> None:
        """Answer once and read no further."""
        self._is_deaf = True
        self._stop_clock()
        response = error_response(error)
        response.headers["Connection"] = "close"
        # of what could not be read there is no id
        response.headers[request_id.HEADER] = request_id.given_or_new(())
        if not self._is_in_head:
            if self._is_settled(response):
                return
        elif self._is_answering():
            # an answer is on its way: it is not mixed with another
            self.cycle.keep_alive = False
            return
        status = HTTPStatus(response.status_code)
        head = [f"HTTP/1.1 {status.value} {status.phrase}".encode()]
        head += [b"%b: %b" % header for header in response.raw_headers]
        self.transport.write(b"\r\n".join((*head, b"", bytes(response.body))))
        # to close at once while more comes in would take the answer back
        if linger_s and self.transport.can_write_eof():
            self.transport.write_eof()
            self._clock_is_for = "linger"
            self._clock = self.loop.call_later(linger_s, self.end)
        else:
            self.transport.close()

    def _is_settled(self, refusal: Response) -> bool:
        """Let go of a request whose body cannot be read; False: `refusal` is to be sent now."""
        cycle: RequestResponseCycle = self.cycle
        if self.pipeline:
            # others are answered first, and then this one
            self.pipeline[0] = (cycle, cast(Any, refusal))  # Starlette's types are looser
            return True
        if cycle.response_complete:
            self.end()
            return True
        if cycle.response_started:
            cycle.keep_alive = False
            return True
        # whoever reads the body hears that no more of it comes
        cycle.disconnected = True
        cycle.message_event.set()
        return False


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """Too many are here already. The body is read: who still writes would not read the answer."""
    while (message := await receive()).get("more_body"):
        pass
    if message["type"] == "http.disconnect":
        return
    error = Overloaded("too many connections are open; try again in a moment")
    response = error_response(error, scope["path"])
    response.headers["Connection"] = "close"
    await response(scope, receive, request_id.answering(scope, send))


def _too_large() -> HeadersTooLarge:
    return HeadersTooLarge(
        f"the headers are over the limit of {MAX_HEADERS} headers or {MAX_HEADER_BYTES:,} bytes; "
        "send fewer"
    )
