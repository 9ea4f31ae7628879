"""Word to the service manager that started this process, where it asked for it: systemd's protocol
for `Type=notify` and `WatchdogSec=`, without a dependency.

Knows sockets and times; nothing of what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable

from chatserve import environment

logger = logging.getLogger(__name__)

BEAT_S = 10.0
PATIENCE_S = 30.0
"""For how long each beat asks to be waited for while models load or answers finish."""


class ServiceManager:
    """Whoever listens at `address`; None and nobody does."""

    def __init__(self, address: str | None, watchdog_s: float | None = None) -> None:
        self._address = address
        self._watchdog_s = watchdog_s
        self._is_changing = True

    @classmethod
    def of_environment(cls) -> ServiceManager:
        return cls(environment.notify_socket(), environment.watchdog_s())

    def ready(self) -> None:
        """Everything asked for is served."""
        self._is_changing = False
        self._say("READY=1", "STATUS=ready")

    def stopping(self) -> None:
        """No new request is taken any more; those under way may finish."""
        self._is_changing = True
        self._say("STOPPING=1", "STATUS=finishing what is under way", _patience())

    @contextlib.asynccontextmanager
    async def told(self, status: Callable[[], str]) -> AsyncIterator[ServiceManager]:
        """While this lasts, say now and then that the event loop goes round.

        While models load or answers finish, `status` is told, too, and patience is asked for:
        neither has an end that could be set in a unit file.
        """
        if self._address is None:
            yield self
            return
        beat = asyncio.create_task(self._beat(status))
        try:
            yield self
        finally:
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)

    async def _beat(self, status: Callable[[], str]) -> None:
        # systemd's advice: twice as often as it asks for
        interval_s = min(BEAT_S, (self._watchdog_s or 2 * BEAT_S) / 2)
        while True:
            lines = ["WATCHDOG=1"] if self._watchdog_s else []
            if self._is_changing:
                lines += [_patience(), f"STATUS={' '.join(status().splitlines())[:200]}"]
            if lines:
                self._say(*lines)
            await asyncio.sleep(interval_s)

    def _say(self, *lines: str) -> None:
        if self._address is None:
            return
        # a leading @ stands for the null byte of an abstract socket
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            logger.debug("the service manager does not listen: %s", error)


def _patience() -> str:
    return f"EXTEND_TIMEOUT_USEC={int(PATIENCE_S * 1e6)}"
