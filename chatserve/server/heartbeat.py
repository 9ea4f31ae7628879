"""The worker's side of the control plane: register, beat, register again, leave.

Knows the controller's URL and a function that tells the worker's status; no engine internals.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
from collections.abc import Callable
from typing import TypeVar

import aiohttp

from chatserve.errors import InvalidRequest, RegistrationFailed
from chatserve.protocol.control import (
    HEARTBEAT_PATH,
    LEAVE_PATH,
    REGISTER_PATH,
    ControlMessage,
    Heartbeat,
    HeartbeatReply,
    Leave,
    Registered,
    Registration,
    WorkerStatus,
    bearer,
    parse,
)

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
LEAVE_TIMEOUT_S = 2.0
FIRST_RETRY_S = 0.2
MAX_RETRY_S = 1.8
MAX_REPLY_BYTES = 64 * 1024

Reply = TypeVar("Reply", bound=ControlMessage)


class Unreachable(Exception):
    """The controller did not answer, or not as one: worth another try."""


class HeartbeatSender:
    """Keeps this worker in the controller's registry for as long as `run` runs."""

    def __init__(
        self,
        controller: str,
        token: str,
        *,
        worker_id: str,
        port: int | None,
        status: Callable[[], WorkerStatus],
        jitter: Callable[[], float] = random.random,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls`: whose certificates an https controller may show; None for the system's."""
        self._controller = controller.rstrip("/")
        self._headers = {"Content-Type": "application/json", **bearer(token)}
        self._worker_id = worker_id
        self._port = port
        self._status = status
        self._jitter = jitter
        self._tls: ssl.SSLContext | bool = tls or True
        self._has_news = asyncio.Event()
        self._waiting: list[asyncio.Future[None]] = []

    def announce(self) -> None:
        """Beat now: the status has changed in a way that should not wait."""
        self._has_news.set()

    async def deliver(self) -> None:
        """`announce`, and wait until the controller has heard it, or cannot be reached."""
        heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(heard)
        self.announce()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(heard, TIMEOUT_S)

    async def run(self) -> None:
        """Register, then beat until cancelled; says goodbye at the end.

        Raises `RegistrationFailed` when the controller refuses this worker.
        """
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        connector = aiohttp.TCPConnector(ssl=self._tls)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, trust_env=False
        ) as session:
            interval_s = await self._register(session)
            try:
                while True:
                    await self._wait(interval_s)
                    if not await self._beat(session):
                        logger.info("%s has forgotten this worker", self._controller)
                        interval_s = await self._register(session)
            finally:
                await self._leave(session)

    async def _register(self, session: aiohttp.ClientSession) -> float:
        """Try until the controller consents. Returns the interval it asks for."""
        retry_s = FIRST_RETRY_S
        while True:
            message = Registration(
                worker_id=self._worker_id, port=self._port, status=self._status()
            )
            try:
                reply = await self._post(session, REGISTER_PATH, message, Registered)
            except Unreachable as error:
                logger.info("cannot register with %s yet: %s", self._controller, error)
                # jitter: workers that lost the same controller must not return in step
                await asyncio.sleep(retry_s * (0.5 + self._jitter()))
                retry_s = min(retry_s * 2, MAX_RETRY_S)
            else:
                logger.info("registered with %s", self._controller)
                return reply.heartbeat_interval_s

    async def _wait(self, interval_s: float) -> None:
        try:
            await asyncio.wait_for(self._has_news.wait(), interval_s)
        except TimeoutError:
            return
        self._has_news.clear()

    async def _beat(self, session: aiohttp.ClientSession) -> bool:
        message = Heartbeat(worker_id=self._worker_id, status=self._status())
        try:
            reply = await self._post(session, HEARTBEAT_PATH, message, HeartbeatReply)
        except Unreachable as error:
            logger.warning("no heartbeat to %s: %s", self._controller, error)
            return True
        return reply.is_known

    async def _leave(self, session: aiohttp.ClientSession) -> None:
        message = Leave(worker_id=self._worker_id)
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                await self._post(session, LEAVE_PATH, message, HeartbeatReply)
        except (Unreachable, RegistrationFailed, TimeoutError) as error:
            logger.info("could not say goodbye to %s: %s", self._controller, error)

    async def _post(
        self,
        session: aiohttp.ClientSession,
        path: str,
        message: ControlMessage,
        kind: type[Reply],
    ) -> Reply:
        """Raises `Unreachable` or, when the controller says no, `RegistrationFailed`."""
        # what is asked for from now on is not in this message
        waiting, self._waiting = self._waiting, []
        try:
            return await self._send(session, path, message, kind)
        finally:
            for heard in waiting:
                if not heard.done():
                    heard.set_result(None)

    async def _send(
        self,
        session: aiohttp.ClientSession,
        path: str,
        message: ControlMessage,
        kind: type[Reply],
    ) -> Reply:
        try:
            async with session.post(
                self._controller + path,
                data=message.to_json(),
                headers=self._headers,
                allow_redirects=False,
            ) as response:
                body = await response.content.read(MAX_REPLY_BYTES)
                status = response.status
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unreachable(str(error) or type(error).__name__) from error
        if status == 200:
            try:
                return parse(kind, body)
            except InvalidRequest as error:
                raise Unreachable(error.message) from error
        if 400 <= status < 500:
            raise RegistrationFailed(
                f"the controller {self._controller} refuses this worker ({status}): "
                f"{_message_in(body)}"
            )
        raise Unreachable(f"it answered with status {status}")


def _message_in(body: bytes) -> str:
    """The message of an OpenAI error, else the body itself, short."""
    text = body.decode("utf-8", "replace")
    _, found, rest = text.partition('"message":"')
    return (rest.partition('","')[0] if found else text)[:300]
