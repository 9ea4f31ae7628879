"""Tools as requests say them: what a model may call, which it must, and the calls of earlier turns.

Takes JSON, gives plain data; knows no template, no grammar and no answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import orjson
from pydantic import BeforeValidator, WithJsonSchema

from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.protocol.fields import refuse_unknown
from chatserve.protocol.json_schema import check_schema

MAX_TOOLS = 128
MAX_CALLS = 128
"""In one message of an earlier turn."""
MAX_TOOLS_BYTES = 256 * 1024
"""Of all tools together: they become one grammar."""
MAX_CALL_ID_CHARS = 256
NAME_PATTERN = "^[A-Za-z0-9_-]{1,64}$"
_NAME = re.compile(NAME_PATTERN.strip("^$"))
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}

# what the functions below accept, for the OpenAPI document; a test holds the two together
NAME_SCHEMA = {"type": "string", "pattern": NAME_PATTERN}
CALL_ID_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_CALL_ID_CHARS}
TOOLS_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "array",
            "maxItems": MAX_TOOLS,
            "items": {
                "type": "object",
                "properties": {
                    "type": {"const": "function"},
                    "function": {
                        "type": "object",
                        "properties": {
                            "name": NAME_SCHEMA,
                            "description": {"type": ["string", "null"]},
                            "parameters": {"type": ["object", "null"]},
                            "strict": {"type": ["boolean", "null"]},
                        },
                        "required": ["name"],
                        "additionalProperties": False,
                    },
                },
                "required": ["type", "function"],
                "additionalProperties": False,
            },
        },
        {"type": "null"},
    ]
}
_NAMED_TOOL_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": NAME_SCHEMA},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["type", "function"],
    "additionalProperties": False,
}
TOOL_CHOICE_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        _NAMED_TOOL_SCHEMA,
        {
            "type": "object",
            "properties": {
                "type": {"const": "allowed_tools"},
                "allowed_tools": {
                    "type": "object",
                    "properties": {
                        "mode": {"enum": ["auto", "required"]},
                        "tools": {
                            "type": "array",
                            "items": _NAMED_TOOL_SCHEMA,
                            "minItems": 1,
                            "maxItems": MAX_TOOLS,
                        },
                    },
                    "required": ["mode", "tools"],
                    "additionalProperties": False,
                },
            },
            "required": ["type", "allowed_tools"],
            "additionalProperties": False,
        },
    ]
}
TOOL_CALLS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_CALLS,
    "items": {
        "type": "object",
        "properties": {
            "id": CALL_ID_SCHEMA,
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "properties": {"name": NAME_SCHEMA, "arguments": {"type": "string"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            },
        },
        "required": ["id", "type", "function"],
        "additionalProperties": False,
    },
}


Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class Tool:
    """A function that the model may ask for.

    schema: what its arguments must match. definition: as the client wrote it, for the prompt.
    """

    name: str
    schema: Mapping[str, Any]
    definition: Mapping[str, Any]


@dataclass(frozen=True)
class ToolChoice:
    """names: the tools that may be called, or all. is_single: one call, neither more nor less."""

    mode: Mode = "auto"
    names: tuple[str, ...] | None = None
    is_single: bool = False


@dataclass(frozen=True)
class ToolCall:
    """What the model has asked for in an earlier turn."""

    call_id: str
    name: str
    arguments: Mapping[str, Any] = field(hash=False)


def read_tools(value: Any) -> tuple[Tool, ...]:
    """Raises `InvalidRequest` naming the part at fault."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise InvalidRequest("tools must be a list", param="tools")
    if len(value) > MAX_TOOLS:
        raise InvalidRequest(
            f"tools has {len(value):,} entries, the limit is {MAX_TOOLS}", param="tools"
        )
    tools: dict[str, Tool] = {}
    num_bytes = 0
    for index, each in enumerate(value):
        tool = _tool(each, f"tools[{index}]")
        if tool.name in tools:
            raise InvalidRequest(
                f"tools[{index}].function.name: there are two tools named {tool.name}",
                param=f"tools[{index}].function.name",
            )
        tools[tool.name] = tool
        num_bytes += _num_bytes(tool, f"tools[{index}]")
        if num_bytes > MAX_TOOLS_BYTES:
            raise InvalidRequest(
                f"tools have more than {MAX_TOOLS_BYTES:,} bytes; send fewer or shorter ones",
                param="tools",
            )
    return tuple(tools.values())


def read_tool_choice(value: Any) -> ToolChoice:
    """Raises `InvalidRequest` naming the part at fault."""
    param = "tool_choice"
    if value is None:
        return ToolChoice()
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise InvalidRequest(
                f"{param} is {value[:40]!r}; use none, auto, required, or an object that names "
                "a function",
                param=param,
            )
        return ToolChoice(cast(Mode, value))
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be a text or an object", param=param)
    if value.get("type") != "allowed_tools":
        return ToolChoice("required", (_named_tool(value, param),), is_single=True)
    refuse_unknown(value, frozenset({"type", "allowed_tools"}), prefix=f"{param}.")
    return _allowed_tools(value.get("allowed_tools"), f"{param}.allowed_tools")


def read_tool_calls(value: Any, param: str) -> tuple[ToolCall, ...]:
    """The calls of a message of the assistant. Raises `InvalidRequest` naming the part at fault."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_CALLS:
        raise InvalidRequest(f"{param} must be a list of 1 to {MAX_CALLS} calls", param=param)
    calls = tuple(_call(each, f"{param}[{i}]") for i, each in enumerate(value))
    ids = [call.call_id for call in calls]
    for index, call_id in enumerate(ids):
        if call_id in ids[:index]:
            raise InvalidRequest(
                f"{param}[{index}].id: there are two calls {call_id[:40]!r}",
                param=f"{param}[{index}].id",
            )
    return calls


def read_call_id(value: Any, param: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_CALL_ID_CHARS:
        raise InvalidRequest(
            f"{param} must be a text of 1 to {MAX_CALL_ID_CHARS} characters", param=param
        )
    return value


def check_choice(choice: ToolChoice, tools: Sequence[Tool]) -> None:
    """Raises `InvalidRequest` for a choice among tools that the request does not have."""
    if choice.mode == "required" and not tools:
        raise InvalidRequest("tool_choice needs tools", param="tool_choice")
    known = {tool.name for tool in tools}
    for name in choice.names or ():
        if name not in known:
            raise InvalidRequest(
                f"tool_choice: there is no tool named {name} among tools", param="tool_choice"
            )


def _tool(value: Any, param: str) -> Tool:
    function = _function(value, param)
    name = read_tool_name(function.get("name"), f"{param}.function.name")
    param = f"{param}.function"
    known = frozenset({"name", "description", "parameters", "strict"})
    refuse_unknown(function, known, prefix=f"{param}.")
    if not isinstance(function.get("description"), str | None):
        raise InvalidRequest(f"{param}.description must be a text", param=f"{param}.description")
    if not isinstance(function.get("strict"), bool | None):
        raise InvalidRequest(f"{param}.strict must be true or false", param=f"{param}.strict")
    schema = _parameters(function.get("parameters"), f"{param}.parameters")
    shown = {name: each for name, each in function.items() if name != "strict" and each is not None}
    return Tool(name, schema, {"type": "function", "function": shown})


def _parameters(value: Any, param: str) -> dict[str, Any]:
    """The schema of a function's arguments, which are always an object."""
    value = NO_PARAMETERS if value is None else value
    schema = check_schema(value, param)
    if schema.get("type", "object") != "object":
        raise InvalidRequest(f"{param}.type must be object", param=f"{param}.type")
    schema["type"] = "object"
    return schema if _is_combined(value) else _closed(schema)


def _is_combined(schema: Any) -> bool:
    """Whether parts of a schema hold for the same value: closed, they might contradict each other,
    or exclude each other where they did not before."""
    if isinstance(schema, list):
        return any(map(_is_combined, schema))
    if not isinstance(schema, dict):
        return False
    keys = schema.keys()
    if keys & {"allOf", "oneOf"} or ("$ref" in keys and keys & {"properties", "anyOf"}):
        return True
    return any(map(_is_combined, schema.values()))


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema, less properties that it knows nothing of.

    Small models would go on inventing some. Whatever matches it matches the one that was sent.
    """
    closed = dict(schema)
    for keyword in ("properties", "$defs", "definitions"):
        if keyword in schema:
            closed[keyword] = {name: _closed_part(each) for name, each in schema[keyword].items()}
    if "items" in schema:
        closed["items"] = _closed_part(schema["items"])
    if "properties" not in schema:
        if "anyOf" in schema:
            closed["anyOf"] = [_closed_part(each) for each in schema["anyOf"]]
    elif not schema.keys() & {"anyOf", "patternProperties"}:
        closed.setdefault("additionalProperties", False)
    return closed


def _closed_part(schema: Any) -> Any:
    return _closed(schema) if isinstance(schema, dict) else schema


def _num_bytes(tool: Tool, param: str) -> int:
    try:
        return len(orjson.dumps(tool.definition))
    except orjson.JSONEncodeError as error:
        raise InvalidRequest(f"{param} is nested too deeply; make it flatter", param=param) from (
            error
        )


def _named_tool(value: Any, param: str) -> str:
    function = _function(value, param)
    refuse_unknown(function, frozenset({"name"}), prefix=f"{param}.function.")
    return read_tool_name(function.get("name"), f"{param}.function.name")


def _allowed_tools(value: Any, param: str) -> ToolChoice:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be an object with mode and tools", param=param)
    refuse_unknown(value, frozenset({"mode", "tools"}), prefix=f"{param}.")
    mode, tools = value.get("mode"), value.get("tools")
    if mode not in ("auto", "required"):
        raise InvalidRequest(f"{param}.mode must be auto or required", param=f"{param}.mode")
    if not isinstance(tools, list) or not 1 <= len(tools) <= MAX_TOOLS:
        raise InvalidRequest(
            f"{param}.tools must be a list of 1 to {MAX_TOOLS} functions", param=f"{param}.tools"
        )
    names = [_named_tool(each, f"{param}.tools[{i}]") for i, each in enumerate(tools)]
    return ToolChoice(mode, tuple(dict.fromkeys(names)))


def _call(value: Any, param: str) -> ToolCall:
    function = _function(value, param, more=frozenset({"id"}))
    refuse_unknown(function, frozenset({"name", "arguments"}), prefix=f"{param}.function.")
    call_id = read_call_id(value.get("id"), f"{param}.id")
    name = read_tool_name(function.get("name"), f"{param}.function.name")
    return ToolCall(call_id, name, _arguments(function, f"{param}.function.arguments"))


def _arguments(function: Mapping[str, Any], param: str) -> dict[str, Any]:
    text = function.get("arguments")
    if not isinstance(text, str):
        raise InvalidRequest(f"{param} must be a text", param=param)
    try:
        # a function without parameters is sometimes called with nothing at all
        arguments = orjson.loads(text) if text.strip() else {}
    except (orjson.JSONDecodeError, UnicodeEncodeError) as error:
        raise InvalidRequest(
            f"{param} is not valid JSON: {error}; leave out calls that were cut short", param=param
        ) from error
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{param} must be a JSON object in a text", param=param)
    return arguments


def _function(value: Any, param: str, more: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The `function` of a tool, a call or a choice, which all look alike."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be an object with type and function", param=param)
    kind = value.get("type")
    if not isinstance(kind, str):
        raise InvalidRequest(f"{param}.type must be function", param=f"{param}.type")
    if kind != "function":
        raise UnsupportedParameter(
            f"{param}.type {kind[:40]!r} is not supported, only function", param=f"{param}.type"
        )
    refuse_unknown(value, frozenset({"type", "function"}) | more, prefix=f"{param}.")
    function = value.get("function")
    if not isinstance(function, dict):
        raise InvalidRequest(
            f"{param}.function must be an object with a name", param=f"{param}.function"
        )
    return function


def read_tool_name(value: Any, param: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InvalidRequest(
            f"{param} must be 1 to 64 letters, digits, underscores and dashes", param=param
        )
    return value


Tools = Annotated[tuple[Tool, ...], BeforeValidator(read_tools), WithJsonSchema(TOOLS_SCHEMA)]
Choice = Annotated[
    ToolChoice, BeforeValidator(read_tool_choice), WithJsonSchema(TOOL_CHOICE_SCHEMA)
]
