"""The items of a Responses request, and the messages of a chat that say the same.

Takes JSON, gives JSON; what a chat refuses is refused there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.protocol.chat import MAX_CONTENT_PARTS, MAX_MESSAGES, ROLES
from chatserve.protocol.fields import NOTHING, refuse_unknown, without_no_ops

MAX_ITEMS = MAX_MESSAGES
ITEM_KINDS = ("message", "function_call", "function_call_output")
# what an item has that came from an answer; none of it is part of the conversation
_MARKS = frozenset({"id", "status", "type"})
_CALL_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "caller": (None,),
    "namespace": (None,),
    "created_by": (None,),
    "async": (None, False),
}
_PART_NO_OPS: Mapping[str, tuple[Any, ...]] = {"annotations": NOTHING}

# what `read_input` accepts, for the OpenAPI document; a test holds the two together
_PART_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"enum": ["input_text", "output_text"]},
        "text": {"type": "string"},
        "annotations": {"enum": list(NOTHING)},
        "logprobs": {"type": ["array", "null"]},
    },
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": _PART_SCHEMA, "minItems": 1, "maxItems": MAX_CONTENT_PARTS},
    ]
}
_TEXT_OR_NULL: dict[str, Any] = {"type": ["string", "null"]}
_MARKS_SCHEMA: dict[str, Any] = {"id": _TEXT_OR_NULL, "status": _TEXT_OR_NULL}
_CALL_SCHEMA: dict[str, Any] = {
    **_MARKS_SCHEMA,
    **{name: {"enum": list(values)} for name, values in _CALL_NO_OPS.items()},
    "call_id": {"type": "string"},
}
INPUT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "anyOf": [
                    {
                        "type": "object",
                        "properties": {
                            **_MARKS_SCHEMA,
                            "type": {"enum": ["message", None]},
                            "role": {"enum": list(ROLES)},
                            "content": _CONTENT_SCHEMA,
                            "phase": _TEXT_OR_NULL,
                        },
                        "required": ["role", "content"],
                        "additionalProperties": False,
                    },
                    {
                        "type": "object",
                        "properties": {
                            **_CALL_SCHEMA,
                            "type": {"const": "function_call"},
                            "name": {"type": "string"},
                            "arguments": {"type": "string"},
                        },
                        "required": ["type", "call_id", "name", "arguments"],
                        "additionalProperties": False,
                    },
                    {
                        "type": "object",
                        "properties": {
                            **_CALL_SCHEMA,
                            "type": {"const": "function_call_output"},
                            "name": _TEXT_OR_NULL,
                            "output": _CONTENT_SCHEMA,
                        },
                        "required": ["type", "call_id", "output"],
                        "additionalProperties": False,
                    },
                ]
            },
            "minItems": 1,
            "maxItems": MAX_ITEMS,
        },
    ]
}


@dataclass
class ChatMessages:
    """Messages of a chat, as JSON, and the places in the input where each came from."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)
    _calls: set[str] = field(default_factory=set)
    _unanswered: dict[str, int] = field(default_factory=dict)

    def add(self, message: dict[str, Any], place: int) -> None:
        self.check_answered()
        self._calls.clear()
        self._add(message, place)

    def _add(self, message: dict[str, Any], place: int) -> None:
        self.messages.append(message)
        self.places.append([place])

    def add_call(self, call: dict[str, Any], place: int) -> None:
        """Calls belong to the assistant's message right before them."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.places[-1].append(place)
        else:
            self.add({"role": "assistant", "content": None}, place)
        self.messages[-1].setdefault("tool_calls", []).append(call)
        self._calls.add(call["id"])
        self._unanswered[call["id"]] = place

    def add_output(self, message: dict[str, Any], place: int) -> None:
        """Only the calls right before them have outputs."""
        call_id = message["tool_call_id"]
        if call_id not in self._calls:
            param = f"input[{place}].call_id"
            raise InvalidRequest(
                f"{param} {call_id[:40]!r} is of no function_call right before it; send that item, "
                "too",
                param=param,
            )
        self._unanswered.pop(call_id, None)
        self._add(message, place)

    def check_answered(self) -> None:
        """Each call has its output before the conversation goes on."""
        for call_id, place in self._unanswered.items():
            param = f"input[{place}].call_id"
            raise InvalidRequest(
                f"{param}: the function_call {call_id[:40]!r} has no function_call_output; send "
                "one with its call_id right behind",
                param=param,
            )

    def check_end(self) -> None:
        """What is to be answered is not the model's own."""
        self.check_answered()
        if self.messages[-1]["role"] == "assistant":
            param = f"input[{self.places[-1][-1]}].role"
            raise InvalidRequest(
                f"{param}: the last item is the assistant's; end input with a message of the user "
                "or a function_call_output",
                param=param,
            )


def input_items(value: Any) -> list[Any]:
    """The items of an input that may be a mere text, as they are kept."""
    if isinstance(value, str):
        part = {"type": "input_text", "text": value}
        return [{"type": "message", "role": "user", "content": [part]}]
    if not isinstance(value, list):
        raise InvalidRequest("input must be a text or a list of items", param="input")
    return value


def read_input(value: Any) -> ChatMessages:
    """Raises `InvalidRequest` or `UnsupportedParameter` naming the item at fault."""
    if isinstance(value, ChatMessages):
        return value
    items = input_items(value)
    if not 1 <= len(items) <= MAX_ITEMS:
        raise InvalidRequest(
            f"input must have 1 to {MAX_ITEMS:,} items, it has {len(items):,}", param="input"
        )
    chat = ChatMessages()
    for place, item in enumerate(items):
        _add_item(chat, item, place)
    chat.check_end()
    return chat


def _add_item(chat: ChatMessages, item: Any, place: int) -> None:
    param = f"input[{place}]"
    if not isinstance(item, dict):
        raise InvalidRequest(f"{param} must be an object", param=param)
    kind = "message" if item.get("type") is None else item["type"]
    if kind not in ITEM_KINDS:
        raise UnsupportedParameter(
            f"{param}.type {str(kind)[:40]!r} is not supported; use one of {', '.join(ITEM_KINDS)}",
            param=f"{param}.type",
        )
    for mark in ("id", "status"):
        if item.get(mark) is not None:
            text_of(item, mark, param)
    if kind == "message":
        chat.add(_message(item, param), place)
    elif kind == "function_call":
        chat.add_call(_call(item, param), place)
    else:
        chat.add_output(_output(item, param), place)


def _message(item: dict[str, Any], param: str) -> dict[str, Any]:
    refuse_unknown(item := dict(item), _MARKS | {"role", "content", "phase"}, prefix=f"{param}.")
    role = text_of(item, "role", param)
    if role not in ROLES:
        raise UnsupportedParameter(
            f"{param}.role {role[:20]!r} is not supported; use one of {', '.join(ROLES)}",
            param=f"{param}.role",
        )
    if item.get("phase") is not None:
        text_of(item, "phase", param)
    return {"role": role, "content": _content(item.get("content"), f"{param}.content")}


def _call(item: dict[str, Any], param: str) -> dict[str, Any]:
    item = without_no_ops(item, _CALL_NO_OPS, prefix=f"{param}.")
    refuse_unknown(item, _MARKS | {"call_id", "name", "arguments"}, prefix=f"{param}.")
    return {
        "id": text_of(item, "call_id", param),
        "type": "function",
        "function": {
            "name": text_of(item, "name", param),
            "arguments": text_of(item, "arguments", param),
        },
    }


def _output(item: dict[str, Any], param: str) -> dict[str, Any]:
    item = without_no_ops(item, _CALL_NO_OPS, prefix=f"{param}.")
    refuse_unknown(item, _MARKS | {"call_id", "name", "output"}, prefix=f"{param}.")
    if item.get("name") is not None:
        text_of(item, "name", param)
    return {
        "role": "tool",
        "tool_call_id": text_of(item, "call_id", param),
        "content": _content(item.get("output"), f"{param}.output"),
    }


def _content(value: Any, param: str) -> str | list[dict[str, str]]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_CONTENT_PARTS:
        raise InvalidRequest(
            f"{param} must be a text or a list of 1 to {MAX_CONTENT_PARTS:,} text parts",
            param=param,
        )
    return [
        {"type": "text", "text": _text_part(part, f"{param}[{i}]")} for i, part in enumerate(value)
    ]


def _text_part(value: Any, param: str) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequest(f"{param} must be an object with a type", param=param)
    if kind not in ("input_text", "output_text"):
        raise UnsupportedParameter(
            f"{param}: parts of type {kind[:40]!r} are not supported, only input_text and "
            "output_text",
            param=param,
        )
    part = without_no_ops(value, _PART_NO_OPS, prefix=f"{param}.")
    refuse_unknown(part, frozenset({"type", "text", "logprobs"}), prefix=f"{param}.")
    if not isinstance(part.get("logprobs"), list | None):
        raise InvalidRequest(f"{param}.logprobs must be a list", param=f"{param}.logprobs")
    return text_of(part, "text", param)


def text_of(fields: Mapping[str, Any], name: str, param: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        what = "is missing" if value is None else "must be a text"
        raise InvalidRequest(f"{param}.{name} {what}", param=f"{param}.{name}")
    return value
