"""Which pages of other origins may use the API from a browser: those that are listed, exactly.

Without a list no answer has a header that would let one in. There are no cookies: a page has to
know a key, or to stand on this machine beside an open server. What the server's own page keeps is
for no other one, listed or not.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Iterable

from starlette.types import Message, Scope, Send

from chatserve.errors import OriginNotAllowed, UsageError
from chatserve.protocol import leniency
from chatserve.server import request_id, truncation

OWN_PREFIX = "/page/"
"""What the server's own page keeps here."""
METHODS = b"GET, POST, DELETE"
MAX_AGE_S = 600
EXPOSED = ", ".join(
    (
        "Retry-After",
        request_id.HEADER,
        request_id.ANTHROPIC_HEADER,
        leniency.HEADER,
        truncation.TOKENS_HEADER,
        truncation.MESSAGES_HEADER,
    )
).encode()

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:\d{1,5})?")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,1024}")


def origins(values: Iterable[str]) -> frozenset[bytes]:
    """`--allow-origin` as browsers spell it in their header. Raises `UsageError`."""
    return frozenset(_origin(value) for value in values)


def _origin(value: str) -> bytes:
    found = _ORIGIN.fullmatch(value)
    if value == "*":
        reason = "would let any page use this server; list the origins that may"
    elif found is None:
        reason = "is no origin; write scheme and host as in https://chat.example, without a path"
    elif found[2] and found[2] == _DEFAULT_PORTS.get(value.partition(":")[0]):
        reason = f"has the port that goes without saying; leave {found[2]} out"
    else:
        return value.encode()
    raise UsageError(f"--allow-origin {value[:100]} {reason}")


def allowed_origin(scope: Scope, allowed: frozenset[bytes]) -> bytes | None:
    """The origin of the page that asks, if it is listed."""
    if not allowed or scope["path"].startswith(OWN_PREFIX):
        return None
    given = [value for name, value in scope["headers"] if name == b"origin"]
    return given[0] if len(given) == 1 and given[0] in allowed else None


def check_own(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raises `OriginNotAllowed` where a browser asks for another page than the server's own.

    Browsers say so in a header that no page can set, for one of another port of this machine, too;
    older ones name the origin at least, in what changes something. Who is no browser says nothing.
    """
    given = {name: value for name, value in headers}
    site = given.get(b"sec-fetch-site")
    origin = given.get(b"origin")
    if site is not None:
        # none: typed into the address line
        is_own = site in (b"same-origin", b"none")
    else:
        is_own = origin is None or origin.partition(b"://")[2] == given.get(b"host")
    if not is_own:
        shown = (origin or site or b"").decode("latin-1")[:100]
        raise OriginNotAllowed(
            f"a page of another site ({shown}) asks for what this server's own page keeps; "
            "open the server's address itself"
        )


def is_preflight(scope: Scope) -> bool:
    """Whether a browser asks if the page may; it has no key to show yet."""
    return scope["method"] == "OPTIONS" and any(
        name == b"access-control-request-method" for name, _ in scope["headers"]
    )


async def consent(scope: Scope, send: Send) -> None:
    """The answer to a preflight: the methods there are, and the headers that it asks for."""
    asked = {name: value for name, value in scope["headers"] if name.startswith(b"access-control-")}
    headers = [
        (b"access-control-allow-methods", METHODS),
        (b"access-control-max-age", b"%d" % MAX_AGE_S),
        (b"content-length", b"0"),
    ]
    wished = asked.get(b"access-control-request-headers", b"")
    if _HEADER_NAMES.fullmatch(wished):
        headers.append((b"access-control-allow-headers", wished))
    if asked.get(b"access-control-request-private-network") == b"true":
        headers.append((b"access-control-allow-private-network", b"true"))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def answering(origin: bytes, send: Send) -> Send:
    """`send` for a request from a page of a listed origin: its script may read the answer."""
    headers = [
        (b"access-control-allow-origin", origin),
        (b"access-control-expose-headers", EXPOSED),
        (b"vary", b"Origin"),
    ]

    def send_to_page(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *headers]}
        return send(message)

    return send_to_page
