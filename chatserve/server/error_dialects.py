"""The shapes of errors: OpenAI's, that of a Responses stream, and Anthropic's. By path.

Takes OpenAI's fields; knows no exception.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import orjson

from chatserve.protocol.anthropic import MESSAGES_PATH
from chatserve.protocol.responses import RESPONSES_PATH
from chatserve.protocol.sse import encode_event

_SEQUENCE_NUMBER = re.compile(rb'"sequence_number":(\d+)\}')
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Dialect(Protocol):
    def body(self, fields: Mapping[str, Any], status: int) -> dict[str, Any]: ...

    def event(self, fields: Mapping[str, Any], status: int, last: bytes) -> bytes:
        """The frame that ends a stream whose last frames were `last`."""
        ...


class OpenAI:
    def body(self, fields: Mapping[str, Any], status: int) -> dict[str, Any]:
        return {"error": fields}

    def event(self, fields: Mapping[str, Any], status: int, last: bytes) -> bytes:
        return encode_event(orjson.dumps(self.body(fields, status)))


class Responses(OpenAI):
    """Of `/v1/responses`: whole, an error is like all others of OpenAI."""

    def event(self, fields: Mapping[str, Any], status: int, last: bytes) -> bytes:
        numbers = _SEQUENCE_NUMBER.findall(last)
        event = {
            "type": "error",
            "code": fields["code"],
            "message": fields["message"],
            "param": fields["param"],
            "sequence_number": int(numbers[-1]) + 1 if numbers else 0,
        }
        return encode_event(orjson.dumps(event), "error")


class Anthropic:
    """Of `/v1/messages`: the field at fault is named in the message alone."""

    def body(self, fields: Mapping[str, Any], status: int) -> dict[str, Any]:
        unusual = "invalid_request_error" if status < 500 else "api_error"
        kind = _ANTHROPIC_TYPES.get(status, unusual)
        return {"type": "error", "error": {"type": kind, "message": fields["message"]}}

    def event(self, fields: Mapping[str, Any], status: int, last: bytes) -> bytes:
        return encode_event(orjson.dumps(self.body(fields, status)), "error")


_OPENAI, _RESPONSES, _ANTHROPIC = OpenAI(), Responses(), Anthropic()


def dialect_of(path: str) -> Dialect:
    if path == MESSAGES_PATH or path.startswith(MESSAGES_PATH + "/"):
        return _ANTHROPIC
    return _RESPONSES if path == RESPONSES_PATH else _OPENAI
