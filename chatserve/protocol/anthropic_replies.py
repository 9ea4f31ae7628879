"""The answers of /v1/messages as types, for the OpenAPI document.

Text only: nothing here is checked while serving. A test holds real answers against them.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextBlock(TypedDict):
    type: Literal["text"]
    text: str


class ToolUseBlock(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(TypedDict):
    """The prompt is the sum of the three kinds of input tokens. What is cached is null until the
    first token has come."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int | None
    output_tokens: int


class MessageReply(TypedDict):
    """`system_fingerprint`: of weights, form, template and engine."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    system_fingerprint: str
    content: list[TextBlock | ToolUseBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageErrorDetail(TypedDict):
    type: str
    message: str


class MessageError(TypedDict):
    """Anthropic's shape of every error, whole or as the last event of a stream."""

    type: Literal["error"]
    error: MessageErrorDetail


class MessageEvent(TypedDict):
    """The stream ends with `message_stop`, or with an `error`."""

    type: Literal[
        "message_start", "content_block_start", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop", "ping", "error",
    ]  # fmt: skip
    message: NotRequired[MessageReply]
    index: NotRequired[int]
    content_block: NotRequired[TextBlock | ToolUseBlock]
    delta: NotRequired[dict[str, Any]]
    usage: NotRequired[MessageUsage]
    error: NotRequired[MessageErrorDetail]


class TokenCount(TypedDict):
    input_tokens: int
