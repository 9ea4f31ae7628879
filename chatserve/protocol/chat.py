"""`POST /v1/chat/completions`: the request. Takes bytes, gives a typed request; no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from chatserve.protocol.tools import (
    CALL_ID_SCHEMA,
    NAME_SCHEMA,
    TOOL_CALLS_SCHEMA,
    Choice,
    ToolCall,
    ToolChoice,
    Tools,
    check_choice,
    read_call_id,
    read_tool_calls,
    read_tool_name,
)

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
    "refusal": (None,),
    "audio": NOTHING,
    "annotations": NOTHING,
    "function_call": NOTHING,
}
_FIELDS = frozenset({"role", "content", "name"})
_RESULT_FIELDS = _FIELDS | {"tool_call_id"}
# developer is what OpenAI now calls the system role
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# what `read_messages` accepts, for the OpenAPI document; a test holds the two together
_TEXT_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT_SCHEMA: dict[str, Any] = {
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
_NULL = {"type": "null"}
_LABEL = {"type": ["string", "null"]}
MESSAGES_SCHEMA = {
    "type": "array",
    "items": {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "role": {"enum": list(ROLES)},
                    "content": _CONTENT_SCHEMA,
                    "name": _LABEL,
                    "tool_calls": {"enum": list(NOTHING)},
                    **no_op_schemas(MESSAGE_NO_OPS),
                },
                "required": ["role", "content"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {
                    "role": {"const": "assistant"},
                    "content": {"anyOf": [*_CONTENT_SCHEMA["anyOf"], _NULL]},
                    "tool_calls": TOOL_CALLS_SCHEMA,
                    "name": _LABEL,
                    **no_op_schemas(MESSAGE_NO_OPS),
                },
                "required": ["role", "tool_calls"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {
                    "role": {"const": "tool"},
                    "content": _CONTENT_SCHEMA,
                    "tool_call_id": CALL_ID_SCHEMA,
                    "name": {"anyOf": [NAME_SCHEMA, _NULL]},
                    "tool_calls": {"enum": list(NOTHING)},
                    **no_op_schemas(MESSAGE_NO_OPS),
                },
                "required": ["role", "content", "tool_call_id"],
                "additionalProperties": False,
            },
        ]
    },
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
}


@dataclass(frozen=True)
class ChatMessage:
    """tool_calls: what the assistant has asked for. tool_call_id: the call that a message of the
    role `tool` answers; name: of the tool that was called."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


def read_messages(value: Any) -> list[ChatMessage]:
    """Raises `InvalidRequest` naming the message at fault."""
    if not isinstance(value, list):
        raise InvalidRequest("messages must be a list", param="messages")
    if not 1 <= len(value) <= MAX_MESSAGES:
        raise InvalidRequest(
            f"messages must have 1 to {MAX_MESSAGES} entries, it has {len(value)}", param="messages"
        )
    messages: list[ChatMessage] = []
    names: dict[str, str] = {}
    unanswered: dict[str, str] = {}
    for index, each in enumerate(value):
        message = _message(each, f"messages[{index}]")
        call_id = message.tool_call_id
        if call_id is None:
            _check_answered(unanswered)
            # only the calls right before them have results
            names = {call.call_id: call.name for call in message.tool_calls}
            unanswered = dict.fromkeys(names, f"messages[{index}].tool_calls")
        elif call_id in names:
            if message.name not in (None, names[call_id]):
                raise InvalidRequest(
                    f"messages[{index}].name is {message.name!r}, but the call is of "
                    f"{names[call_id]}; leave it out",
                    param=f"messages[{index}].name",
                )
            message = replace(message, name=names[call_id])
            unanswered.pop(call_id, None)
        else:
            raise InvalidRequest(
                f"messages[{index}].tool_call_id {call_id[:40]!r} is no call of the "
                "assistant's message before it; send that message with its tool_calls, too",
                param=f"messages[{index}].tool_call_id",
            )
        messages.append(message)
    if messages[-1].tool_call_id is not None:
        _check_answered(unanswered)
    return messages


def _check_answered(unanswered: Mapping[str, str]) -> None:
    """Each call has its result before the chat goes on. Values: where the calls are."""
    for call_id, param in unanswered.items():
        raise InvalidRequest(
            f"{param}: the call {call_id[:40]!r} has no result; send a message of the role tool "
            "with its tool_call_id right behind",
            param=param,
        )


def _message(value: Any, param: str) -> ChatMessage:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be an object with role and content", param=param)
    role = value.get("role")
    fields = without_no_ops(value, MESSAGE_NO_OPS, prefix=f"{param}.")
    if not isinstance(role, str):
        raise InvalidRequest(f"{param}.role must be a text", param=f"{param}.role")
    if role not in (*ROLES, "tool"):
        raise UnsupportedParameter(
            f"{param}.role {role[:20]!r} is not supported; use one of {', '.join(ROLES)}, tool",
            param=f"{param}.role",
        )
    calls = fields.pop("tool_calls", None)
    refuse_unknown(fields, _RESULT_FIELDS if role == "tool" else _FIELDS, prefix=f"{param}.")
    if role != "tool" and not isinstance(fields.get("name"), str | None):
        # no template shows who it is that speaks
        raise InvalidRequest(f"{param}.name must be a text", param=f"{param}.name")
    has_calls = calls not in NOTHING
    if has_calls and role != "assistant":
        raise InvalidRequest(
            f"{param}.tool_calls is for messages of the assistant", param=f"{param}.tool_calls"
        )
    if has_calls:
        tool_calls = read_tool_calls(calls, f"{param}.tool_calls")
        content = fields.get("content")
        text = "" if content is None else _content(content, f"{param}.content")
        return ChatMessage(role, text, tool_calls)
    text = _content(fields.get("content"), f"{param}.content")
    if role == "tool":
        call_id = read_call_id(fields.get("tool_call_id"), f"{param}.tool_call_id")
        name = fields.get("name")
        if name is not None:
            name = read_tool_name(name, f"{param}.name")
        return ChatMessage(role, text, tool_call_id=call_id, name=name)
    return ChatMessage(ROLES[role], text)


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
    tools: Tools = ()
    tool_choice: Choice = Field(default_factory=ToolChoice)
    parallel_tool_calls: bool | None = None

    @property
    def is_open(self) -> bool:
        """Whether the last message is the beginning of the answer."""
        return bool(self.continue_final_message)

    @property
    def offers_tools(self) -> bool:
        """Whether the model gets to know of tools at all."""
        return bool(self.tools) and self.tool_choice.mode != "none"

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
    check_choice(request.tool_choice, request.tools)
    request.check_choice_among_answers()
    if request.rank_by is not None and request.offers_tools:
        raise UnsupportedParameter(
            "rank_by rates texts, and answers that call tools are none; leave tools out, or make "
            'tool_choice "none"',
            param="rank_by",
        )
    if request.is_open and request.messages[-1].tool_calls:
        raise InvalidRequest(
            "continue_final_message needs a last message without tool_calls; leave it out",
            param="continue_final_message",
        )
    if request.add_generation_prompt is request.is_open:
        raise InvalidRequest(
            "add_generation_prompt must be the contrary of continue_final_message; leave it out",
            param="add_generation_prompt",
        )
    return request
