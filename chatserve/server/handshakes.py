"""A door for TLS whose handshakes are counted: the longest under way makes room for a new one.

asyncio's own server keeps any number of connections that never say hello, and shows none of them:
they would take all the files that this process may open. Knows sockets; nothing of what is served.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from functools import partial
from ssl import SSLContext

logger = logging.getLogger(__name__)

MAX_HANDSHAKES = 64
TIMEOUT_S = 10.0
ACCEPTED_AT_ONCE = 100
# as asyncio does where no more files can be opened
PAUSE_S = 1.0


class TlsServer:
    """Listens at `door`; each connection that has shaken hands gets a protocol of `connect`."""

    def __init__(
        self, door: socket.socket, tls: SSLContext, connect: Callable[[], asyncio.Protocol]
    ) -> None:
        """Call it inside the event loop."""
        self._door = door
        self._tls = tls
        self._connect = connect
        self._loop = asyncio.get_running_loop()
        # in the order in which they came
        self._shaking: dict[asyncio.Task[None], None] = {}
        self._pause: asyncio.TimerHandle | None = None
        self._listen()

    def close(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._door)
        self._door.close()
        for task in self._shaking:
            task.cancel()

    async def wait_closed(self) -> None:
        if self._shaking:
            await asyncio.wait(self._shaking)

    def _listen(self) -> None:
        self._pause = None
        self._loop.add_reader(self._door, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                sock, _ = self._door.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.error("no connection can be taken for %g s: %s", PAUSE_S, error)
                self._loop.remove_reader(self._door)
                self._pause = self._loop.call_later(PAUSE_S, self._listen)
                return
            self._begin(sock)

    def _begin(self, sock: socket.socket) -> None:
        if len(self._shaking) >= MAX_HANDSHAKES:
            oldest = next(iter(self._shaking))
            del self._shaking[oldest]
            oldest.cancel()
        task = self._loop.create_task(self._shake_hands(sock))
        self._shaking[task] = None
        task.add_done_callback(partial(self._end, sock))

    async def _shake_hands(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await self._loop.connect_accepted_socket(
            self._connect, sock, ssl=self._tls, ssl_handshake_timeout=TIMEOUT_S
        )

    def _end(self, sock: socket.socket, task: asyncio.Task[None]) -> None:
        self._shaking.pop(task, None)
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or error is not None:
            sock.close()
        # who does not speak TLS, or leaves, is nobody's trouble
        if error is not None and not isinstance(error, OSError):
            logger.error("a handshake failed: %s", error, exc_info=error)
