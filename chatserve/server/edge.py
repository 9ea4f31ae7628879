"""The outermost layer of controller and worker: who may come in, and with what.

Pure ASGI, around the whole app: Host, bearer token, media type, body size, and the doors that close
while a server drains. Denies by default: a route that nobody thought of needs a key. Knows no route
but the open ones, and no OpenAI field.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatserve.errors import (
    BodyTooLarge,
    ChatserveError,
    HostNotAllowed,
    InvalidAPIKey,
    ShuttingDown,
    UnsupportedMediaType,
    UsageError,
)
from chatserve.protocol.openai import MAX_BODY_BYTES
from chatserve.server.error_response import error_response

OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/health/decode"})
CONTROL_PREFIX = "/control/"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name other than localhost may be anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, *, has_key: bool, insecure_no_auth: bool = False) -> None:
    """Refuse to serve strangers without a key. Raises `UsageError`."""
    if is_loopback(host) or has_key or insecure_no_auth:
        return
    raise UsageError(
        f"--host {host} is reachable from other machines and no API key is set; set "
        "CHATSERVE_API_KEYS or --api-key-file, or allow it with --insecure-no-auth"
    )


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


@dataclass(frozen=True)
class AccessPolicy:
    """Whose requests are let in.

    `api_keys` None leaves `/v1` open (a loopback server without keys). `control_keys` opens
    `/control/` only; a controller always has one. `hosts` None skips the Host check (a public
    address, where the key is the guard).
    """

    api_keys: tuple[bytes, ...] | None = None
    control_keys: tuple[bytes, ...] = ()
    hosts: frozenset[str] | None = field(default=frozenset(LOOPBACK_NAMES))

    @classmethod
    def build(
        cls,
        host: str,
        *,
        api_keys: Iterable[str] = (),
        control_token: str | None = None,
        allow_hosts: Iterable[str] = (),
    ) -> AccessPolicy:
        """The policy for a server on `host`; digests are kept, secrets are not."""
        shown = f"[{host}]" if ":" in host else host
        return cls(
            api_keys=tuple(map(digest, api_keys)) or None,
            control_keys=(digest(control_token),) if control_token else (),
            hosts=frozenset((*LOOPBACK_NAMES, shown, *allow_hosts)) if is_loopback(host) else None,
        )

    def check(self, path: str, headers: list[tuple[bytes, bytes]]) -> None:
        """Raises `HostNotAllowed` or `InvalidAPIKey`."""
        if self.hosts is not None:
            _check_host(headers, self.hosts)
        if path in OPEN_PATHS:
            return
        if path.startswith(CONTROL_PREFIX):
            _check_key(headers, self.control_keys)
        elif self.api_keys is not None:
            _check_key(headers, self.api_keys)


def _values(headers: list[tuple[bytes, bytes]], name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in headers if key == name]


def _check_host(headers: list[tuple[bytes, bytes]], allowed: frozenset[str]) -> None:
    values = _values(headers, b"host")
    if len(values) == 1:
        name, _, port = values[0].rpartition(":")
        # "[::1]" without a port ends in "]", not in digits
        host = name if name and port.isascii() and port.isdigit() else values[0]
        if host.lower() in allowed:
            return
    shown = ", ".join(values)[:100] or "(none)"
    raise HostNotAllowed(
        f"Host {shown} is not allowed here; use http://127.0.0.1 or start with --allow-host"
    )


def _check_key(headers: list[tuple[bytes, bytes]], keys: tuple[bytes, ...]) -> None:
    values = _values(headers, b"authorization")
    scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    # latin-1 is how the header was read: these are the bytes the client sent
    given = hashlib.sha256(token.strip().encode("latin-1")).digest()
    # every key is compared, so that time tells nothing about which one was near
    matches = [hmac.compare_digest(given, key) for key in keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise InvalidAPIKey("the API key is missing or wrong; send `Authorization: Bearer KEY`")


class Edge:
    """Wraps `app`; counts what is under way, so that a server can drain."""

    def __init__(
        self, app: ASGIApp, policy: AccessPolicy, *, max_body_bytes: int = MAX_BODY_BYTES
    ) -> None:
        self.app = app
        self.is_draining = False
        self.num_in_flight = 0
        self._policy = policy
        self._max_body_bytes = max_body_bytes
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def drain(self) -> None:
        """Refuse new requests with 503; those under way go on. Health and control stay open."""
        self.is_draining = True

    async def idle(self) -> None:
        """Wait until no request is under way."""
        await self._is_idle.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            try:
                limited = self._admit(scope, receive)
            except ChatserveError as error:
                await error_response(error)(scope, receive, send)
            else:
                await self._serve(scope, limited, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _admit(self, scope: Scope, receive: Receive) -> Receive:
        path, headers = scope["path"], scope["headers"]
        self._policy.check(path, headers)
        if self.is_draining and self._is_counted(path):
            raise ShuttingDown("the server is shutting down; try again when it is back")
        if scope["method"] in METHODS_WITH_BODY:
            _check_media_type(headers)
        return self._limit_body(headers, receive)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._is_counted(scope["path"]):
            await self.app(scope, receive, send)
            return
        self.num_in_flight += 1
        self._is_idle.clear()
        try:
            await self.app(scope, receive, send)
        finally:
            self.num_in_flight -= 1
            if not self.num_in_flight:
                self._is_idle.set()

    @staticmethod
    def _is_counted(path: str) -> bool:
        return path not in OPEN_PATHS and not path.startswith(CONTROL_PREFIX)

    def _limit_body(self, headers: list[tuple[bytes, bytes]], receive: Receive) -> Receive:
        limit = self._max_body_bytes
        declared = _values(headers, b"content-length")
        is_number = bool(declared) and declared[0].isascii() and declared[0].isdigit()
        if is_number and int(declared[0][:19]) > limit:
            raise _too_large(limit)
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > limit:
                    raise _too_large(limit)
            return message

        return counted


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is over the limit of {limit} bytes")


def _check_media_type(headers: list[tuple[bytes, bytes]]) -> None:
    kinds = _values(headers, b"content-type")
    if len(kinds) != 1 or kinds[0].partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("the body must be JSON; send `Content-Type: application/json`")
    if any(value.strip().lower() != "identity" for value in _values(headers, b"content-encoding")):
        raise UnsupportedMediaType("compressed bodies are not accepted; send plain JSON")
