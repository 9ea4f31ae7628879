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
import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatserve.errors import (
    BodyTooLarge,
    BodyTooSlow,
    ChatserveError,
    HostNotAllowed,
    InvalidAPIKey,
    ShuttingDown,
    UnsupportedMediaType,
    UsageError,
)
from chatserve.protocol.adapters import LOAD_PATH, SETTLE_PATH, STAGE_PATH, UNLOAD_PATH
from chatserve.protocol.control import MAX_RESUME_BYTES, RESUME_PATH
from chatserve.protocol.fields import MAX_BODY_BYTES
from chatserve.protocol.measured import METRICS_PATH, STATUS_PATH
from chatserve.protocol.operation import (
    ADMIN_PREFIX,
    DRAIN_WORKER_PATH,
    LOAD_MODEL_PATH,
    MODELS_PATH,
    UNLOAD_MODEL_PATH,
)
from chatserve.server import cross_origin, request_id
from chatserve.server.disconnect import log_left
from chatserve.server.error_log import ErrorLog
from chatserve.server.error_response import error_response
from chatserve.server.outcome import begin
from chatserve.server.tracing import Tracing

OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/health/decode"})
KEYED_PATHS = frozenset(
    {
        LOAD_PATH, UNLOAD_PATH, STAGE_PATH, SETTLE_PATH,
        LOAD_MODEL_PATH, UNLOAD_MODEL_PATH, DRAIN_WORKER_PATH,
    }
)  # fmt: skip
"""They change what a server serves: open to nobody without a key, whatever else is open."""
WATCHED_PATHS = frozenset({METRICS_PATH, STATUS_PATH, MODELS_PATH})
"""An operator looks there again and again, also while a server drains."""
CONTROL_PREFIX = "/control/"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_KEYED = (
    " (a key of CHATSERVE_API_KEYS or --api-key-file, or CHATSERVE_CONTROL_TOKEN; a server without "
    "either changes nothing of what it serves)"
)
OPERATOR = "chatserve.operator"
"""In the scope of what is below `/admin/`: whether the control token was shown, not just a key."""
KEY_HEADER = b"x-api-key"
_CREDENTIALS = (b"authorization", KEY_HEADER)
METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
CHARSETS = frozenset({"utf-8", "utf8", "us-ascii"})
BODY_TIMEOUT_S = 30.0


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
    `/control/` and `/admin/` only; a controller always has one. `hosts` None skips the Host check
    (a public address, where the key is the guard). `origins` are those whose pages may ask.
    """

    api_keys: tuple[bytes, ...] | None = None
    control_keys: tuple[bytes, ...] = ()
    hosts: frozenset[str] | None = field(default=frozenset(LOOPBACK_NAMES))
    origins: frozenset[bytes] = frozenset()

    @classmethod
    def build(
        cls,
        host: str,
        *,
        api_keys: Iterable[str] = (),
        control_token: str | None = None,
        allow_hosts: Iterable[str] = (),
        allow_origins: Iterable[str] = (),
    ) -> AccessPolicy:
        """The policy for a server on `host`; digests are kept, secrets are not.

        Raises `UsageError` for an origin that is none.
        """
        shown = f"[{host}]" if ":" in host else host
        return cls(
            api_keys=tuple(map(digest, api_keys)) or None,
            control_keys=(digest(control_token),) if control_token else (),
            hosts=frozenset((*LOOPBACK_NAMES, shown, *allow_hosts)) if is_loopback(host) else None,
            origins=cross_origin.origins(allow_origins),
        )

    def check(self, path: str, headers: list[tuple[bytes, bytes]]) -> None:
        """Raises `HostNotAllowed` or `InvalidAPIKey`."""
        self.check_host(headers)
        if path in OPEN_PATHS:
            return
        if path.startswith(cross_origin.OWN_PREFIX):
            cross_origin.check_own(headers)
        if path.startswith(CONTROL_PREFIX):
            _check_key(headers, self.control_keys)
        elif path in KEYED_PATHS:
            _check_key(headers, (*(self.api_keys or ()), *self.control_keys), _KEYED)
        elif self.api_keys is not None:
            operators = self.control_keys if path.startswith(ADMIN_PREFIX) else ()
            _check_key(headers, (*self.api_keys, *operators))

    def check_host(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Raises `HostNotAllowed`."""
        if self.hosts is not None:
            _check_host(headers, self.hosts)

    def is_operator(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Whether they bring the control token."""
        try:
            _check_key(headers, self.control_keys)
        except InvalidAPIKey:
            return False
        return True

    def is_open(self, path: str) -> bool:
        """Whether all clients are alike here, whatever key they happen to send."""
        return self.api_keys is None and not path.startswith(CONTROL_PREFIX)


def _without_keys(scope: Scope) -> Scope:
    headers = [each for each in scope["headers"] if each[0] not in _CREDENTIALS]
    return {**scope, "headers": headers}


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


def _check_key(headers: list[tuple[bytes, bytes]], keys: tuple[bytes, ...], hint: str = "") -> None:
    scheme, token = _credentials(headers)
    # latin-1 is how the header was read: these are the bytes the client sent
    given = hashlib.sha256(token.strip().encode("latin-1")).digest()
    # every key is compared, so that time tells nothing about which one was near
    matches = [hmac.compare_digest(given, key) for key in keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise InvalidAPIKey(
            "the API key is missing or wrong; send `Authorization: Bearer KEY`" + hint
        )


def _credentials(headers: list[tuple[bytes, bytes]]) -> tuple[str, str]:
    """Scheme and key. Anthropic's `x-api-key` counts where there is no Authorization."""
    values = _values(headers, b"authorization")
    if len(values) == 1:
        scheme, _, token = values[0].partition(" ")
        return scheme, token
    keys = [] if values else _values(headers, KEY_HEADER)
    return ("bearer", keys[0]) if len(keys) == 1 else ("", "")


class Edge:
    """Wraps `app`; counts what is under way, so that a server can drain."""

    def __init__(
        self,
        app: ASGIApp,
        policy: AccessPolicy,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
        check_room: Callable[[Scope], None] | None = None,
        open_pages: frozenset[str] = frozenset(),
        errors: ErrorLog | None = None,
    ) -> None:
        """`check_room` is asked before a body is read. It raises where that would be in vain.

        `open_pages`: paths that anybody may get, and do nothing else with. `errors` hears what
        became of each request but those for health, numbers and control.
        """
        self.app = app
        self._open_pages = open_pages
        self.is_draining = False
        self._drained_at = 0.0
        self.num_in_flight = 0
        self._policy = policy
        self._check_room = check_room
        self._errors = errors
        self.tracing: Tracing | None = None
        self._max_body_bytes = max_body_bytes
        self._readings: set[asyncio.Timeout] = set()
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def drain(self, seconds: float = 0.0) -> None:
        """Refuse new requests with 503; those under way go on. Health and control stay open.

        A request is under way once its body is complete. Those that are refused are told to come
        back when the `seconds` are over in which others may finish.
        """
        self.is_draining = True
        self._drained_at = time.monotonic() + seconds
        for reading in self._readings:
            # one whose time is just over cannot be told again
            if not reading.expired():
                reading.reschedule(asyncio.get_running_loop().time())

    async def idle(self) -> None:
        """Wait until no request is under way."""
        await self._is_idle.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            outcome = begin()
            span = None if self.tracing is None else self.tracing.begin(scope, outcome)
            send = request_id.answering(scope, send)
            if scope["method"] == "HEAD":
                # the answer to a GET, of which uvicorn leaves the body out
                scope = {**scope, "method": "GET"}
            try:
                await self._answer(scope, receive, send)
            except asyncio.CancelledError:
                # what still runs when the listener closes is cut; uvicorn would log a traceback
                if not self.is_draining:
                    raise
            finally:
                if self._errors is not None and self._is_counted(scope["path"]):
                    self._errors.note(outcome)
                if span is not None and self.tracing is not None:
                    self.tracing.end(span, outcome)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        page = cross_origin.allowed_origin(scope, self._policy.origins)
        if page is not None:
            send = cross_origin.answering(page, send)
        try:
            if page is not None and cross_origin.is_preflight(scope):
                self._policy.check_host(scope["headers"])
                await cross_origin.consent(scope, send)
                return
            receive = await self._admit(scope, receive)
        except ClientDisconnect:
            log_left(scope)
        except ChatserveError as error:
            response = error_response(error, scope["path"])
            if isinstance(error, (BodyTooSlow, ShuttingDown)):
                # the rest of a body may never come: no other request could follow it
                response.headers["Connection"] = "close"
            await response(scope, receive, send)
        else:
            if scope["path"].startswith(ADMIN_PREFIX):
                scope = {**scope, OPERATOR: self._policy.is_operator(scope["headers"])}
            if self._policy.is_open(scope["path"]):
                scope = _without_keys(scope)
            await self._serve(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive) -> Receive:
        """Check all there is to check, and read the body: the app gets it in one piece."""
        path, headers = scope["path"], scope["headers"]
        if path in self._open_pages and scope["method"] == "GET":
            self._policy.check_host(headers)
        else:
            self._policy.check(path, headers)
        is_counted = self._is_counted(path)
        if self.is_draining and is_counted:
            raise self._shutting_down()
        if scope["method"] not in METHODS_WITH_BODY:
            return receive
        if self._check_room is not None:
            self._check_room(_without_keys(scope) if self._policy.is_open(path) else scope)
        has_media_type = bool(_values(headers, b"content-type"))
        if has_media_type:
            _check_media_type(headers)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S) as reading:
                if is_counted:
                    self._readings.add(reading)
                is_resumed = path == RESUME_PATH
                limit = MAX_RESUME_BYTES if is_resumed else self._max_body_bytes
                body = await self._read_body(headers, receive, limit)
        except TimeoutError:
            if self.is_draining:
                raise self._shutting_down() from None
            raise BodyTooSlow(
                f"the body was not complete after {BODY_TIMEOUT_S:g} s; send it without a pause"
            ) from None
        finally:
            self._readings.discard(reading)
        if body and not has_media_type:
            _check_media_type(headers)
        return _replayed(body, receive)

    def _shutting_down(self) -> ShuttingDown:
        left_s = math.ceil(self._drained_at - time.monotonic())
        return ShuttingDown(
            "the server is shutting down; try again when it is back", retry_after_s=max(1, left_s)
        )

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
        if path == RESUME_PATH:
            return True
        return not (path in OPEN_PATHS or path in WATCHED_PATHS or path.startswith(CONTROL_PREFIX))

    async def _read_body(
        self, headers: list[tuple[bytes, bytes]], receive: Receive, limit: int
    ) -> bytes:
        declared = _values(headers, b"content-length")
        is_number = bool(declared) and declared[0].isascii() and declared[0].isdigit()
        if is_number and int(declared[0][:19]) > limit:
            raise _too_large(limit)
        body = bytearray()
        has_more = True
        while has_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > limit:
                raise _too_large(limit)
            has_more = message.get("more_body", False)
        return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that first gives `body` and then whatever `receive` has to say."""
    message: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def replay() -> Message:
        nonlocal message
        if message is None:
            return await receive()
        first, message = message, None
        return first

    return replay


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is over the limit of {limit} bytes")


def _check_media_type(headers: list[tuple[bytes, bytes]]) -> None:
    kinds = _values(headers, b"content-type")
    if len(kinds) != 1 or kinds[0].partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("the body must be JSON; send `Content-Type: application/json`")
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]*)", kinds[0], re.IGNORECASE)
    if charset and charset[1].lower() not in CHARSETS:
        raise UnsupportedMediaType(f"JSON comes in UTF-8, not in {charset[1][:40]}; send it so")
    if any(value.strip().lower() != "identity" for value in _values(headers, b"content-encoding")):
        raise UnsupportedMediaType("compressed bodies are not accepted; send plain JSON")
