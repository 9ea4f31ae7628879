"""`POST /v1/chat/completions`: the request. Takes bytes, gives a typed request; no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.protocol.fields import (
    INT64,
    NOTHING,
    no_op_schemas,
    read_object,
    refuse_unknown,
    validate,
    without_no_ops,
)
from chatserve.protocol.sampling_request import MAX_TOP_LOGPROBS, SamplingRequest

MAX_MESSAGES = 1024
MAX_CONTENT_PARTS = 1024

CHAT_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "functions": NOTHING,
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": NOTHING,
    "prediction": NOTHING,
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "service_tier": (None, "auto", "default"),
}
MESSAGE_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "name": (None,),
    "refusal": (None,),
    "audio": NOTHING,
    "annotations": NOTHING,
    "function_call": NOTHING,
}
# developer is what OpenAI now calls the system role
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# what `read_messages` accepts, for the OpenAPI document; a test holds the two together
_TEXT_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": _TEXT_PART_SCHEMA,
            "minItems": 1,
            "maxItems": MAX_CONTENT_PARTS,
        },
    ]
}
MESSAGES_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": _CONTENT_SCHEMA,
            **no_op_schemas(MESSAGE_NO_OPS),
        },
        "required": ["role", "content"],
        "additionalProperties": False,
    },
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
}


@dataclass(frozen=True)
class ChatMessage:
    role: str
    content: str


def read_messages(value: Any) -> list[ChatMessage]:
    """Raises `InvalidRequest` naming the message at fault."""
    if not isinstance(value, list):
        raise InvalidRequest("messages must be a list", param="messages")
    if not 1 <= len(value) <= MAX_MESSAGES:
        raise InvalidRequest(
            f"messages must have 1 to {MAX_MESSAGES} entries, it has {len(value)}", param="messages"
        )
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(value: Any, param: str) -> ChatMessage:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be an object with role and content", param=param)
    fields = without_no_ops(value, MESSAGE_NO_OPS, prefix=f"{param}.")
    refuse_unknown(fields, frozenset({"role", "content"}), prefix=f"{param}.")
    role = fields.get("role")
    if not isinstance(role, str):
        raise InvalidRequest(f"{param}.role must be a text", param=f"{param}.role")
    if role not in ROLES:
        raise UnsupportedParameter(
            f"{param}.role {role[:20]!r} is not supported; use one of {', '.join(ROLES)}",
            param=f"{param}.role",
        )
    return ChatMessage(ROLES[role], _content(fields.get("content"), f"{param}.content"))


def _content(value: Any, param: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"{param} must be a text or a list of text parts", param=param)
    if len(value) > MAX_CONTENT_PARTS:
        raise InvalidRequest(
            f"{param} has {len(value)} parts, the limit is {MAX_CONTENT_PARTS}", param=param
        )
    return "\n".join(_text_part(part, f"{param}[{i}]") for i, part in enumerate(value))


def _text_part(value: Any, param: str) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequest(f"{param} must be an object with a type", param=param)
    if kind != "text":
        raise UnsupportedParameter(
            f"{param}: parts of type {kind[:40]!r} are not supported, only text", param=param
        )
    refuse_unknown(value, frozenset({"type", "text"}), prefix=f"{param}.")
    if not isinstance(value.get("text"), str):
        raise InvalidRequest(f"{param}.text must be a text", param=f"{param}.text")
    return str(value["text"])


class ChatRequest(SamplingRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[
        list[ChatMessage], BeforeValidator(read_messages), WithJsonSchema(MESSAGES_SCHEMA)
    ]
    max_completion_tokens: int | None = Field(None, ge=1, lt=INT64)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    truncation: Literal["disabled", "rolling"] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    @property
    def is_open(self) -> bool:
        """Whether the last message is the beginning of the answer."""
        return bool(self.continue_final_message)

    @property
    def num_top(self) -> int | None:
        """How many likely tokens to tell at each place; None: not even the token's own logprob."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def parse_chat(body: bytes) -> ChatRequest:
    """Read a chat request. Raises `InvalidRequest` or `UnsupportedParameter` naming the field."""
    return read_chat(read_object(body))


def read_chat(payload: dict[str, Any]) -> ChatRequest:
    """The same, of what has been read already. Raises as `parse_chat` does."""
    request = validate(ChatRequest, payload, CHAT_NO_OPS)
    request.check_streaming()
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidRequest(
            f"max_tokens is {request.max_tokens} but max_completion_tokens is "
            f"{request.max_completion_tokens}; give only one",
            param="max_tokens",
        )
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    if request.add_generation_prompt is request.is_open:
        raise InvalidRequest(
            "add_generation_prompt must be the contrary of continue_final_message; leave it out",
            param="add_generation_prompt",
        )
    return request
