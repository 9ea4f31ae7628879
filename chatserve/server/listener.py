"""Listener: bound sockets with uvicorn behind it, starting and stopping when it is told to.

uvicorn's own signal handling is left out: whoever runs the process decides what a signal means.
Knows no routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from chatserve.errors import CannotBind
from chatserve.protocol.control import SOCKET_SCHEME
from chatserve.server.connection import DEFAULT_CONNECTIONS, Connection, Connections
from chatserve.server.edge import Edge
from chatserve.server.handshakes import TlsServer
from chatserve.server.slow_reader import DEFAULT_TIMEOUT_S, limit_unsent

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEEPALIVE_S = 5
ABORT_S = 2


class Door(socket.socket):
    """A socket that listens; with `tls` only to those who speak it."""

    tls: ssl.SSLContext | None = None


def bind(host: str, port: int, tls: ssl.SSLContext | None = None) -> Door:
    """Listen on `host:port` at once, so that nobody else can; port 0 takes a free one.

    Raises `CannotBind`.
    """
    try:
        # localhost may also be ::1, and half of the clients try only one of them
        name = "127.0.0.1" if host == "localhost" else host
        family, kind, protocol, _, address = socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = Door(family, kind, protocol)
        sock.tls = tls
    except OSError as error:
        raise CannotBind(
            f"cannot listen on {host}: {_reason(error)}; choose another --host"
        ) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        limit_unsent(sock)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        hint = "choose another --port, or 0 for a free one"
        if error.errno == errno.EADDRNOTAVAIL:
            hint = "this machine does not have that address; choose another --host"
        raise CannotBind(f"cannot listen on {host}:{port}: {_reason(error)}; {hint}") from error
    sock.setblocking(False)
    return sock


def bind_path(path: Path) -> Door:
    """Listen on a socket of the file system; one that nobody listens on any more gives way.

    Raises `CannotBind`.
    """
    sock = Door(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        sock.bind(str(path))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise CannotBind(f"cannot listen on {path}: {_reason(error)}") from error
    sock.setblocking(False)
    return sock


def port_of(sock: Door) -> int | None:
    """None of a socket of the file system."""
    return None if sock.family == socket.AF_UNIX else int(sock.getsockname()[1])


def url_of(host: str, sock: Door) -> str:
    """The URL by which this machine reaches `sock`; a wildcard address is reached over loopback."""
    if sock.family == socket.AF_UNIX:
        return f"{SOCKET_SCHEME}{sock.getsockname()}"
    name = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    scheme = "https" if sock.tls else "http"
    return f"{scheme}://{f'[{name}]' if ':' in name else name}:{sock.getsockname()[1]}"


def _requests(number: int) -> str:
    return f"{number} request{'s' * (number != 1)}"


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


class _Server(uvicorn.Server):
    """uvicorn's server with our own connections, some of them over TLS."""

    def __init__(
        self,
        config: uvicorn.Config,
        doors: Sequence[Door],
        connections: Connections,
    ) -> None:
        super().__init__(config)
        self.is_up = asyncio.Event()
        self._doors = doors
        self._connections = connections

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise RuntimeError("the app did not start; its traceback is in the log")
        loop = asyncio.get_running_loop()
        servers: list[Any] = [
            TlsServer(door, door.tls, self._connect)
            if door.tls
            else await _listening(loop, door)(self._connect, sock=door, backlog=BACKLOG)
            for door in self._doors
        ]
        self.servers = servers  # uvicorn closes them and waits for their end
        self.started = True
        self.is_up.set()

    def _connect(self) -> Connection:
        state = self.lifespan.state
        return Connection(self.config, self.server_state, state, self._connections)


def _listening(loop: asyncio.AbstractEventLoop, door: Door) -> Callable[..., Awaitable[Any]]:
    return loop.create_unix_server if door.family == socket.AF_UNIX else loop.create_server


class Listener:
    """Serves `edge` at `doors` from `start` to `close`; `drain` in between, to end gently.

    At most `max_connections` are served at once; one that takes nothing of its answer for
    `write_timeout_s` is cut.
    """

    def __init__(
        self,
        edge: Edge,
        *doors: Door,
        max_connections: int = DEFAULT_CONNECTIONS,
        write_timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._edge = edge
        self._doors = doors
        config = uvicorn.Config(
            edge,
            log_config=None,
            access_log=False,
            server_header=False,
            # who calls is told by the socket: a registering worker cannot name another host
            proxy_headers=False,
            ws="none",
            lifespan="on",
            timeout_keep_alive=KEEPALIVE_S,
            timeout_graceful_shutdown=ABORT_S,
        )
        self.connections = Connections(max_connections, write_timeout_s)
        self._server = _Server(config, doors, self.connections)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return once requests are answered."""
        self._task = asyncio.create_task(self._server.serve(list(self._doors)))
        up = asyncio.create_task(self._server.is_up.wait())
        await asyncio.wait({self._task, up}, return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        if self._task.done():
            self._task.result()

    async def drain(
        self,
        *,
        seconds: float,
        hurry: asyncio.Event,
        abort: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Refuse new requests and let those under way finish.

        After `seconds`, or when `hurry` is set, `abort` is called to end what still runs with an
        error that its client can read.
        """
        self._edge.drain(seconds)
        if self._edge.num_in_flight and seconds and not hurry.is_set():
            logger.info(
                "waiting up to %g s for %s to finish; Ctrl-C once more stops at once",
                seconds,
                _requests(self._edge.num_in_flight),
            )
        await self._wait_until_idle(seconds, hurry)
        if self._edge.num_in_flight:
            logger.warning("cutting %s short", _requests(self._edge.num_in_flight))
            if abort is not None:
                await abort()
                await self._wait_until_idle(ABORT_S, asyncio.Event())

    async def close(self) -> None:
        """Close the sockets; connections that are still in use are cut a moment later."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task

    async def _wait_until_idle(self, seconds: float, hurry: asyncio.Event) -> None:
        if not self._edge.num_in_flight or hurry.is_set():
            return
        idle = asyncio.create_task(self._edge.idle())
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait({idle, hurried}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for waiter in (idle, hurried):
            waiter.cancel()
