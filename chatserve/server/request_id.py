"""The id by which one request is found again: in its answer, in the logs, and behind a proxy.

A client's own is taken over if it is one visible word of up to 128 characters of ASCII, so that it
can neither begin a line of a log nor look like another field of it; else one is made. Knows no
route but Anthropic's, whose SDKs read a header of another name.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Iterable
from contextvars import ContextVar

from starlette.types import Message, Scope, Send

from chatserve.protocol.anthropic import MESSAGES_PATH
from chatserve.server.outcome import note_status

HEADER = "x-request-id"
ANTHROPIC_HEADER = "request-id"
MAX_LEN = 128
_FORM = re.compile(rb"[!-~]{1,%d}" % MAX_LEN)
NO_REQUEST = "-"
_current: ContextVar[str] = ContextVar("request_id", default=NO_REQUEST)


def current_request_id() -> str:
    """Of the request that is being answered in this task."""
    return _current.get()


def given_or_new(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The only one that `headers` give, if it may be used."""
    given = [value for name, value in headers if name == HEADER.encode()]
    if len(given) == 1 and _FORM.fullmatch(given[0]):
        return given[0].decode()
    return f"req_{uuid.uuid4().hex}"


def answering(scope: Scope, send: Send) -> Send:
    """`send` for a request that begins: its answer has the id, as has all that is logged."""
    request_id = given_or_new(scope["headers"])
    _current.set(request_id)
    is_anthropic = scope["path"].startswith(MESSAGES_PATH)
    names = (HEADER, ANTHROPIC_HEADER) if is_anthropic else (HEADER,)
    headers = [(name.encode(), request_id.encode()) for name in names]

    def send_with_id(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            note_status(message["status"])
            message = {**message, "headers": [*message["headers"], *headers]}
        return send(message)

    return send_with_id
