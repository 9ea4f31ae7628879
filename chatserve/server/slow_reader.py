"""SlowReader: how long a client may leave its answer unread before its connection is cut.

One timer while a connection cannot take more, none per token. Knows a transport, no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import socket

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 30.0
MIN_PROGRESS_BYTES = 1024
"""So much must go out in that time: a client that takes a byte now and then takes nothing."""
MAX_UNSENT_BYTES = 64 * 1024


class SlowReader:
    """Of one connection: `pause` when its buffer is full, `resume` when there is room again."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        """`timeout_s` 0: it may take for ever."""
        self._loop = loop
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None

    def pause(self, transport: asyncio.Transport) -> None:
        self.resume()
        if self._timeout_s:
            num_bytes = transport.get_write_buffer_size()
            self._timer = self._loop.call_later(self._timeout_s, self._look, transport, num_bytes)

    def resume(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, transport: asyncio.Transport, num_bytes_before: int) -> None:
        self._timer = None
        if num_bytes_before - transport.get_write_buffer_size() >= MIN_PROGRESS_BYTES:
            self.pause(transport)
            return
        logger.info(
            "a client has not read its answer for %g s: its connection is cut", self._timeout_s
        )
        transport.abort()


def limit_unsent(sock: socket.socket) -> None:
    """Let the system keep little of what goes out by connections to `sock`, beside what is on its
    way: else it would be megabytes before anybody knows that a client does not read."""
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if option is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, option, MAX_UNSENT_BYTES)
