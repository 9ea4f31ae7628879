"""Anthropic's `POST /v1/messages` and `/v1/messages/count_tokens`: the requests, and the chats that
they are. Takes bytes; no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.protocol.anthropic_blocks import (
    CACHE_CONTROL,
    MESSAGES_SCHEMA,
    TEXT_SCHEMA,
    Turns,
    read_messages,
    read_text,
)
from chatserve.protocol.chat import ChatRequest, read_chat
from chatserve.protocol.field_names import FieldNames
from chatserve.protocol.fields import (
    INT64,
    NOTHING,
    Priority,
    read_object,
    refuse_unknown,
    validate,
    without_no_ops,
)
from chatserve.protocol.response_items import text_of
from chatserve.protocol.sampling_request import MAX_STOP_BYTES, MAX_STOPS
from chatserve.protocol.tools import MAX_TOOLS, NAME_SCHEMA

MESSAGES_PATH = "/v1/messages"
COUNT_TOKENS_PATH = "/v1/messages/count_tokens"

COUNT_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "cache_control": CACHE_CONTROL,
    "thinking": (None, {"type": "disabled"}),
    "speed": (None, "standard"),
    "user_profile_id": (None,),
    "workspace_id": (None,),
}
MESSAGES_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    **COUNT_NO_OPS,
    "container": (None,),
    "diagnostics": NOTHING,
    "inference_geo": (None,),
    "service_tier": (None, "auto", "standard_only"),
}
_TOOL_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "cache_control": CACHE_CONTROL,
    "allowed_callers": (None, ["direct"]),
    "defer_loading": (None, False),
    "eager_input_streaming": (None, False, True),
    "input_examples": NOTHING,
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}

STOP_SEQUENCES_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_BYTES},
            "maxItems": MAX_STOPS,
        },
        {"type": "null"},
    ]
}
TOOLS_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "type": {"enum": ["custom", None]},
                    "name": NAME_SCHEMA,
                    "description": {"type": ["string", "null"]},
                    "input_schema": {"type": "object"},
                    "strict": {"type": ["boolean", "null"]},
                },
                "required": ["name", "input_schema"],
            },
            "maxItems": MAX_TOOLS,
        },
        {"type": "null"},
    ]
}
_PARALLEL = {"disable_parallel_tool_use": {"type": ["boolean", "null"]}}
TOOL_CHOICE_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"enum": list(_CHOICES)}, **_PARALLEL},
            "required": ["type"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "tool"},
                "name": NAME_SCHEMA,
                **_PARALLEL,
            },
            "required": ["type", "name"],
            "additionalProperties": False,
        },
        {"type": "null"},
    ]
}
METADATA_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"user_id": {"type": ["string", "null"]}},
            "additionalProperties": False,
        },
        {"type": "null"},
    ]
}
OUTPUT_CONFIG_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "effort": {"enum": [None]},
                "format": {
                    "anyOf": [
                        {
                            "type": "object",
                            "properties": {
                                "type": {"const": "json_schema"},
                                "schema": {"type": "object"},
                            },
                            "required": ["type", "schema"],
                            "additionalProperties": False,
                        },
                        {"type": "null"},
                    ]
                },
            },
            "additionalProperties": False,
        },
        {"type": "null"},
    ]
}


def _system(value: Any) -> Any:
    return None if value is None else read_text(value, "system")


def _stop_sequences(value: Any) -> Any:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise InvalidRequest("stop_sequences must be a list of texts", param="stop_sequences")
    return tuple(value)


def _metadata(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InvalidRequest("metadata must be an object", param="metadata")
    refuse_unknown(value := dict(value), frozenset({"user_id"}), prefix="metadata.")
    if not isinstance(value.get("user_id"), str | None):
        raise InvalidRequest("metadata.user_id must be a text", param="metadata.user_id")
    return value


def _output_config(value: Any) -> Any:
    """The `response_format` that says the same."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InvalidRequest("output_config must be an object", param="output_config")
    fields = without_no_ops(value, {"effort": (None,)}, prefix="output_config.")
    refuse_unknown(fields, frozenset({"format"}), prefix="output_config.")
    asked = fields.get("format")
    if asked is None:
        return None
    param = "output_config.format"
    if not isinstance(asked, dict) or asked.get("type") != "json_schema":
        raise UnsupportedParameter(f"{param} must be of type json_schema", param=param)
    refuse_unknown(asked := dict(asked), frozenset({"type", "schema"}), prefix=f"{param}.")
    schema = {"name": "output", "schema": asked.get("schema")}
    return {"type": "json_schema", "json_schema": schema}


def _tools(value: Any) -> Any:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise InvalidRequest("tools must be a list", param="tools")
    if len(value) > MAX_TOOLS:
        raise InvalidRequest(
            f"tools has {len(value):,} entries, the limit is {MAX_TOOLS}", param="tools"
        )
    return tuple(_tool(tool, f"tools[{i}]") for i, tool in enumerate(value))


def _tool(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be an object", param=param)
    if value.get("type") not in (None, "custom"):
        raise UnsupportedParameter(
            f"{param}.type {str(value['type'])[:40]!r} is not supported, only custom",
            param=f"{param}.type",
        )
    fields = without_no_ops(value, _TOOL_NO_OPS, prefix=f"{param}.")
    known = frozenset({"type", "name", "description", "input_schema", "strict"})
    refuse_unknown(fields, known, prefix=f"{param}.")
    if not isinstance(fields.get("input_schema"), dict):
        raise InvalidRequest(
            f"{param}.input_schema must be an object", param=f"{param}.input_schema"
        )
    function = {"name": fields.get("name"), "parameters": fields["input_schema"]}
    function |= {name: fields[name] for name in ("description", "strict") if name in fields}
    return {"type": "function", "function": function}


def _tool_choice(value: Any) -> Any:
    """The fields of a chat that say the same."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise InvalidRequest("tool_choice must be an object with a type", param="tool_choice")
    kind, param = value["type"], "tool_choice"
    known = {"type", "name"} if kind == "tool" else {"type"}
    refuse_unknown(
        value := dict(value), frozenset(known | {"disable_parallel_tool_use"}), prefix=f"{param}."
    )
    is_single = value.get("disable_parallel_tool_use")
    if not isinstance(is_single, bool | None):
        raise InvalidRequest(
            f"{param}.disable_parallel_tool_use must be true or false",
            param=f"{param}.disable_parallel_tool_use",
        )
    fields = {} if is_single is None else {"parallel_tool_calls": not is_single}
    if kind == "tool":
        named = {"name": text_of(value, "name", param)}
        return {"tool_choice": {"type": "function", "function": named}, **fields}
    if kind not in _CHOICES:
        raise UnsupportedParameter(
            f"{param}.type {kind[:40]!r} is not supported; use auto, any, tool or none",
            param=f"{param}.type",
        )
    return {"tool_choice": _CHOICES[kind], **fields}


class CountTokensRequest(BaseModel):
    """`POST /v1/messages/count_tokens`."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )

    model: str = Field(max_length=500)
    messages: Annotated[Turns, BeforeValidator(read_messages), WithJsonSchema(MESSAGES_SCHEMA)]
    system: Annotated[
        str | None,
        BeforeValidator(_system),
        WithJsonSchema({"anyOf": [*TEXT_SCHEMA["anyOf"], {"type": "null"}]}),
    ] = None
    tools: Annotated[
        tuple[dict[str, Any], ...], BeforeValidator(_tools), WithJsonSchema(TOOLS_SCHEMA)
    ] = ()
    tool_choice: Annotated[
        dict[str, Any], BeforeValidator(_tool_choice), WithJsonSchema(TOOL_CHOICE_SCHEMA)
    ] = Field(default_factory=dict)
    output_config: Annotated[
        Any, BeforeValidator(_output_config), WithJsonSchema(OUTPUT_CONFIG_SCHEMA)
    ] = None


class MessagesRequest(CountTokensRequest):
    """`POST /v1/messages`."""

    max_tokens: int = Field(ge=1, lt=INT64)
    stream: bool | None = None
    stop_sequences: Annotated[
        tuple[Any, ...], BeforeValidator(_stop_sequences), WithJsonSchema(STOP_SEQUENCES_SCHEMA)
    ] = ()
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=INT64)
    priority: Priority | None = None
    metadata: Annotated[
        dict[str, Any] | None, BeforeValidator(_metadata), WithJsonSchema(METADATA_SCHEMA)
    ] = None


_SAME = ("max_tokens", "stream", "temperature", "top_p", "top_k", "priority")
_NAMES = {
    r"stop\b": "stop_sequences",
    r"(tools\[\d+\])\.function\.parameters": r"\1.input_schema",
    r"(tools\[\d+\])\.function": r"\1",
    r"tool_choice\.function": "tool_choice",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    r"response_format\.json_schema": "output_config.format",
    "response_format": "output_config.format",
}


@dataclass(frozen=True)
class AskedMessage:
    """A chat that came as Anthropic's messages, and what its fields are called there."""

    chat: ChatRequest
    names: FieldNames


def parse_messages(body: bytes) -> AskedMessage:
    """Raises `InvalidRequest` or `UnsupportedParameter` naming the field."""
    request = validate(MessagesRequest, read_object(body), MESSAGES_NO_OPS, labels=frozenset())
    fields = {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    return _asked(request, fields | {"stop": list(request.stop_sequences)})


def parse_count_tokens(body: bytes) -> AskedMessage:
    """Raises as `parse_messages` does."""
    return _asked(
        validate(CountTokensRequest, read_object(body), COUNT_NO_OPS, labels=frozenset()), {}
    )


def _asked(request: CountTokensRequest, fields: dict[str, Any]) -> AskedMessage:
    messages, sources = list(request.messages.messages), list(request.messages.sources)
    if request.system is not None:
        messages.insert(0, {"role": "system", "content": request.system})
        sources.insert(0, "system")
    payload = {"model": request.model, "messages": messages, **fields, **request.tool_choice}
    if request.tools:
        payload["tools"] = list(request.tools)
    if request.output_config is not None:
        payload["response_format"] = request.output_config
    if messages[-1]["role"] == "assistant":
        payload["continue_final_message"] = True
    # the beginning of an answer is asked for by sending it
    names = FieldNames(sources, {**_NAMES, "continue_final_message": sources[-1]})
    with names.in_errors():
        return AskedMessage(read_chat(payload), names)
