"""Anthropic's /v1/messages, in the document."""

from __future__ import annotations

from chatserve.protocol.anthropic import (
    COUNT_NO_OPS,
    COUNT_TOKENS_PATH,
    MESSAGES_NO_OPS,
    MESSAGES_PATH,
    CountTokensRequest,
    MessagesRequest,
)
from chatserve.protocol.anthropic_replies import (
    MessageError,
    MessageEvent,
    MessageReply,
    TokenCount,
)
from chatserve.server.openapi.operation import (
    ANY_REQUEST,
    WITH_BODY,
    WITH_MODEL,
    Body,
    Operation,
)

NO_LABELS: frozenset[str] = frozenset()
ERRORS = (*ANY_REQUEST, *WITH_BODY, *WITH_MODEL)
_EXAMPLE = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Say hello."}]}

OPERATIONS = (
    Operation(
        "post", MESSAGES_PATH, "createMessage", "Messages", "Answer messages as Anthropic does",
        MessageReply,
        about="The key may come as `x-api-key`. The protocol has no `seed`.",
        body=Body(
            MessagesRequest, {**_EXAMPLE, "max_tokens": 100}, MESSAGES_NO_OPS, labels=NO_LABELS
        ),
        event=MessageEvent, errors=ERRORS, error=MessageError,
    ),
    Operation(
        "post", COUNT_TOKENS_PATH, "countMessageTokens", "Messages",
        "How many tokens messages have", TokenCount,
        body=Body(CountTokensRequest, _EXAMPLE, COUNT_NO_OPS, labels=NO_LABELS),
        errors=ERRORS, error=MessageError,
    ),
)  # fmt: skip
