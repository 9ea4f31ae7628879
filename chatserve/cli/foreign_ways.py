"""What some OpenAI-compatible servers want otherwise in a request, found out by their refusals.

Knows request bodies and errors; no socket.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from chatserve.errors import InvalidRequest, UnsupportedParameter

NO_USAGE = "no stream_options"
COMPLETION_TOKENS = "max_completion_tokens"


def foreign_way(body: dict[str, Any], error: InvalidRequest) -> str | None:
    """What to do otherwise after this refusal of `body`; None where nothing is known to help."""
    told = f"{error.param} {error.message}"
    if "stream_options" in body and ("stream_options" in told or "include_usage" in told):
        return NO_USAGE
    # OpenAI's newer models
    is_limit = isinstance(error, UnsupportedParameter) and error.param == "max_tokens"
    if is_limit and "max_tokens" in body and COMPLETION_TOKENS in error.message:
        return COMPLETION_TOKENS
    return None


def adapted(body: dict[str, Any], ways: Set[str]) -> dict[str, Any]:
    """`body` as a server wants it that has taught us these ways."""
    if NO_USAGE in ways:
        body = {name: value for name, value in body.items() if name != "stream_options"}
    if COMPLETION_TOKENS in ways and "max_tokens" in body:
        rest = {name: value for name, value in body.items() if name != "max_tokens"}
        body = {**rest, COMPLETION_TOKENS: body["max_tokens"]}
    return body
