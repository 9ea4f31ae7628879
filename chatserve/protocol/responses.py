"""`POST /v1/responses`: the request, and the chat that it is. Takes bytes; no engine, no store.

A `previous_response_id` has been expanded into `input` by whoever keeps responses; here it is only
a label of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from chatserve.errors import InvalidRequest, UnsupportedParameter
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
from chatserve.protocol.response_items import INPUT_SCHEMA, ChatMessages, read_input
from chatserve.protocol.sampling_request import MAX_TOP_LOGPROBS
from chatserve.protocol.tools import MAX_TOOLS, NAME_SCHEMA

RESPONSES_PATH = "/v1/responses"
MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
MAX_ID_LEN = 100
LOGPROBS = "message.output_text.logprobs"

RESPONSES_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "background": (None, False),
    "background_options": NOTHING,
    "conversation": NOTHING,
    "prompt": NOTHING,
    "context_management": NOTHING,
    "moderation": NOTHING,
    "max_tool_calls": (None,),
    "service_tier": (None, "auto", "default"),
    "reasoning": (
        None, {}, {"effort": None}, {"effort": "none"}, {"summary": None},
        {"effort": None, "summary": None}, {"effort": "none", "summary": None},
    ),
    "stream_options": (None, {}, {"include_obfuscation": False}),
    "prompt_cache_retention": (None, "in_memory"),
    "prompt_cache_options": NOTHING,
    "image": NOTHING,
    "access_programs": NOTHING,
}  # fmt: skip
_TEXT_NO_OPS: Mapping[str, tuple[Any, ...]] = {"verbosity": (None, "medium")}
_TOOL_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "allowed_callers": (None, ["direct"]),
    "async": (None, False),
    "defer_loading": (None, False),
    "output_schema": NOTHING,
}

TOOLS_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "type": {"const": "function"},
                    "name": NAME_SCHEMA,
                    "description": {"type": ["string", "null"]},
                    "parameters": {"type": ["object", "null"]},
                    "strict": {"type": ["boolean", "null"]},
                },
                "required": ["type", "name"],
            },
            "maxItems": MAX_TOOLS,
        },
        {"type": "null"},
    ]
}
TOOL_CHOICE_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        {
            "type": "object",
            "properties": {"type": {"const": "function"}, "name": NAME_SCHEMA},
            "required": ["type", "name"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "allowed_tools"},
                "mode": {"enum": ["auto", "required"]},
                "tools": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "function"}, "name": NAME_SCHEMA},
                        "required": ["type", "name"],
                    },
                    "minItems": 1,
                    "maxItems": MAX_TOOLS,
                },
            },
            "required": ["type", "mode", "tools"],
            "additionalProperties": False,
        },
    ]
}
TEXT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "format": {
                    "anyOf": [
                        {
                            "type": "object",
                            "properties": {"type": {"enum": ["text", "json_object"]}},
                            "required": ["type"],
                            "additionalProperties": False,
                        },
                        {
                            "type": "object",
                            "properties": {
                                "type": {"const": "json_schema"},
                                "name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
                                "description": {"type": ["string", "null"]},
                                "schema": {"type": "object"},
                                "strict": {"type": ["boolean", "null"]},
                            },
                            "required": ["type", "name", "schema"],
                            "additionalProperties": False,
                        },
                        {"type": "null"},
                    ]
                },
                "verbosity": {"enum": [None, "medium"]},
            },
            "additionalProperties": False,
        },
        {"type": "null"},
    ]
}
METADATA_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "propertyNames": {"maxLength": MAX_METADATA_KEY},
            "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_VALUE},
            "maxProperties": MAX_METADATA,
        },
        {"type": "null"},
    ]
}
INCLUDE_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "array", "items": {"const": LOGPROBS}}, {"type": "null"}]
}


def _include(value: Any) -> Any:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise InvalidRequest("include must be a list of texts", param="include")
    for name in value:
        if name != LOGPROBS:
            raise UnsupportedParameter(
                f"include: {str(name)[:60]!r} is not supported, only {LOGPROBS}", param="include"
            )
    return tuple(value)


def _text(value: Any) -> Any:
    """The `response_format` that says what `text` says."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest("text must be an object", param="text")
    fields = without_no_ops(value, _TEXT_NO_OPS, prefix="text.")
    refuse_unknown(fields, frozenset({"format"}), prefix="text.")
    asked = fields.get("format")
    if asked is None:
        return {}
    if isinstance(asked, dict) and asked.get("type") == "json_schema":
        schema = {name: each for name, each in asked.items() if name != "type"}
        return {"type": "json_schema", "json_schema": schema}
    if not isinstance(asked, dict):
        raise InvalidRequest("text.format must be an object", param="text.format")
    return asked


def _tools(value: Any) -> Any:
    """The tools of a chat: their fields lie one level deeper there."""
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
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequest(f"{param} must be an object with a type", param=param)
    if kind != "function":
        raise UnsupportedParameter(
            f"{param}.type {kind[:40]!r} is not supported, only function",
            param=f"{param}.type",
        )
    fields = without_no_ops(value, _TOOL_NO_OPS, prefix=f"{param}.")
    del fields["type"]
    return {"type": "function", "function": fields}


def _tool_choice(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequest(
            "tool_choice must be a text or an object with a type", param="tool_choice"
        )
    rest = {name: each for name, each in value.items() if name != "type"}
    if kind == "function":
        return {"type": kind, "function": rest}
    if kind == "allowed_tools":
        if isinstance(tools := rest.get("tools"), list):
            rest["tools"] = [_tool(tool, f"tool_choice.tools[{i}]") for i, tool in enumerate(tools)]
        return {"type": kind, "allowed_tools": rest}
    raise UnsupportedParameter(
        f"tool_choice.type {kind[:40]!r} is not supported; use function or allowed_tools",
        param="tool_choice.type",
    )


def _metadata(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise InvalidRequest("metadata must map texts to texts", param="metadata")
    if len(value) > MAX_METADATA:
        raise InvalidRequest(
            f"metadata has {len(value):,} entries, the limit is {MAX_METADATA}", param="metadata"
        )
    for key, each in value.items():
        if len(key) > MAX_METADATA_KEY or len(each) > MAX_METADATA_VALUE:
            raise InvalidRequest(
                f"metadata may have keys of {MAX_METADATA_KEY} and values of {MAX_METADATA_VALUE} "
                f"characters; one has {len(key):,} and {len(each):,}",
                param="metadata",
            )
    return value


class ResponsesRequest(BaseModel):
    """`POST /v1/responses`. None means: the model's default."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )

    model: str = Field(max_length=500)
    input: Annotated[ChatMessages, BeforeValidator(read_input), WithJsonSchema(INPUT_SCHEMA)]
    instructions: str | None = None
    previous_response_id: str | None = Field(None, max_length=MAX_ID_LEN)
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=INT64)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=INT64)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    priority: Priority | None = None
    truncation: Literal["auto", "disabled"] | None = None
    text: Annotated[dict[str, Any], BeforeValidator(_text), WithJsonSchema(TEXT_SCHEMA)] = Field(
        default_factory=dict
    )
    tools: Annotated[
        tuple[dict[str, Any], ...], BeforeValidator(_tools), WithJsonSchema(TOOLS_SCHEMA)
    ] = ()
    tool_choice: Annotated[
        Any, BeforeValidator(_tool_choice), WithJsonSchema(TOOL_CHOICE_SCHEMA)
    ] = None
    parallel_tool_calls: bool | None = None
    include: Annotated[
        tuple[str, ...], BeforeValidator(_include), WithJsonSchema(INCLUDE_SCHEMA)
    ] = ()
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    metadata: Annotated[
        dict[str, str], BeforeValidator(_metadata), WithJsonSchema(METADATA_SCHEMA)
    ] = Field(default_factory=dict)
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


_SAME = (
    "model", "stream", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "seed", "tool_choice", "parallel_tool_calls",
    "priority",
)  # fmt: skip
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    r"response_format\.json_schema": "text.format",
    "response_format": "text.format",
    r"(tools\[\d+\])\.function": r"\1",
    r"(tool_choice)\.allowed_tools\.(tools\[\d+\])\.function": r"\1.\2",
    r"tool_choice\.(?:function|allowed_tools)": "tool_choice",
}


@dataclass(frozen=True)
class AskedResponse:
    """A Responses request, the chat that it is, and what the chat's fields are called here.

    `raw` is the request as it came. `places`: the items that each message of the chat came from.
    """

    request: ResponsesRequest
    raw: Mapping[str, Any]
    chat: ChatRequest
    names: FieldNames
    places: tuple[tuple[int, ...], ...]


def parse_response(body: bytes) -> AskedResponse:
    """Raises `InvalidRequest` or `UnsupportedParameter` naming the field."""
    raw = read_object(body)
    request = validate(ResponsesRequest, raw, RESPONSES_NO_OPS, labels=frozenset())
    if request.top_logprobs and LOGPROBS not in request.include:
        raise InvalidRequest(f"top_logprobs needs include: [{LOGPROBS!r}]", param="top_logprobs")
    messages = list(request.input.messages)
    places = [tuple(each) for each in request.input.places]
    sources = [f"input[{each[0]}]" for each in places]
    if request.instructions is not None:
        messages.insert(0, {"role": "system", "content": request.instructions})
        places.insert(0, ())
        sources.insert(0, "instructions")
    names = FieldNames(sources, _NAMES, _sources_of_calls(messages, places))
    payload = {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    payload |= {"messages": messages}
    if request.max_output_tokens is not None:
        payload["max_completion_tokens"] = request.max_output_tokens
    if request.text:
        payload["response_format"] = request.text
    if request.tools:
        payload["tools"] = list(request.tools)
    if request.truncation == "auto":
        payload["truncation"] = "rolling"
    if LOGPROBS in request.include:
        payload |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    with names.in_errors():
        chat = read_chat(payload)
    return AskedResponse(request, raw, chat, names, tuple(places))


def _sources_of_calls(
    messages: Sequence[Mapping[str, Any]], places: Sequence[tuple[int, ...]]
) -> dict[str, str]:
    """The items that calls came from: they are the last of their message's."""
    sources = {}
    for number, (message, items) in enumerate(zip(messages, places, strict=True)):
        num_calls = len(message.get("tool_calls", ()))
        for place, item in enumerate(items[len(items) - num_calls :]):
            sources[f"messages[{number}].tool_calls[{place}]"] = f"input[{item}]"
    return sources
