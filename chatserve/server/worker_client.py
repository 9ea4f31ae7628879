"""WorkerClient: how the controller reaches workers: over TCP, or a socket of the file system.

Knows HTTP and addresses; no routes, and nothing of what is said.
"""

from __future__ import annotations

import asyncio
import socket
from types import TracebackType
from typing import Any

import aiohttp

from chatserve.protocol.control import SOCKET_SCHEME

CONNECT_TIMEOUT_S = 2.0
# under uvicorn's 5 s, so that a kept connection is never used while the worker closes it
KEEPALIVE_S = 2.0
# of an answer that its client does not read: twice each, one here and one in the system
MAX_UNREAD_BYTES = 32 * 1024
# what a worker on a socket of the file system is called in requests; its Host check knows it
_NAME = "http://localhost"


class WorkerClient:
    """No limit on time or number, no redirects, no proxies. Used by `async with`.

    A worker's `base_url` is `http://HOST:PORT`, or `unix:PATH`. For each path there is a session;
    they are as few as the workers that one supervisor has.
    """

    def __init__(self) -> None:
        self._tcp: aiohttp.ClientSession
        self._by_path: dict[str, aiohttp.ClientSession] = {}

    async def __aenter__(self) -> WorkerClient:
        connector = aiohttp.TCPConnector(
            limit=0, keepalive_timeout=KEEPALIVE_S, socket_factory=_open_socket
        )
        self._tcp = _session(connector)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        sessions = [self._tcp, *self._by_path.values()]
        await asyncio.gather(*(session.close() for session in sessions))

    def post(self, base_url: str, path: str, **options: Any) -> Any:
        """As aiohttp's; its errors are raised when the answer is awaited or entered."""
        session, url = self._at(base_url)
        return session.post(url + path, allow_redirects=False, **options)

    def get(self, base_url: str, path: str, **options: Any) -> Any:
        session, url = self._at(base_url)
        return session.get(url + path, allow_redirects=False, **options)

    def _at(self, base_url: str) -> tuple[aiohttp.ClientSession, str]:
        if not base_url.startswith(SOCKET_SCHEME):
            return self._tcp, base_url
        path = base_url.removeprefix(SOCKET_SCHEME)
        session = self._by_path.get(path)
        if session is None:
            connector = aiohttp.UnixConnector(path, limit=0, keepalive_timeout=KEEPALIVE_S)
            session = self._by_path[path] = _session(connector)
        return session, _NAME


def _session(connector: aiohttp.BaseConnector) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        read_bufsize=MAX_UNREAD_BYTES,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
    )


def _open_socket(info: aiohttp.AddrInfoType) -> socket.socket:
    """The system would take in megabytes for a client that reads none of it."""
    family, kind, protocol, *_ = info
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MAX_UNREAD_BYTES)
    return sock
