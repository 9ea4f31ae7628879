"""The content blocks of Anthropic's messages, and the messages of a chat that say the same.

Takes JSON, gives JSON; what a chat refuses is refused there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.protocol.chat import MAX_CONTENT_PARTS, MAX_MESSAGES
from chatserve.protocol.fields import NOTHING, refuse_unknown, without_no_ops
from chatserve.protocol.response_items import text_of

# a prefix that was computed once is kept without being told to
CACHE_CONTROL: tuple[Any, ...] = (
    None, {"type": "ephemeral"}, {"type": "ephemeral", "ttl": "5m"},
    {"type": "ephemeral", "ttl": "1h"},
)  # fmt: skip
_BLOCK_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "cache_control": CACHE_CONTROL,
    "citations": NOTHING,
    "caller": (None, {"type": "direct"}),
    "toolset_name": (None,),
}
ERROR_MARK = "Error: "
"""In front of a tool's result that `is_error`: chats have no other word for it."""

# what `read_messages` accepts, for the OpenAPI document; a test holds the two together
_NO_OPS_SCHEMA: dict[str, Any] = {
    name: {"enum": list(values)} for name, values in _BLOCK_NO_OPS.items()
}
TEXT_BLOCK_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {**_NO_OPS_SCHEMA, "type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
TEXT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": TEXT_BLOCK_SCHEMA,
            "minItems": 1,
            "maxItems": MAX_CONTENT_PARTS,
        },
    ]
}
_TOOL_USE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        **_NO_OPS_SCHEMA,
        "type": {"const": "tool_use"},
        "id": {"type": "string"},
        "name": {"type": "string"},
        "input": {"type": "object"},
    },
    "required": ["type", "id", "name", "input"],
    "additionalProperties": False,
}
_TOOL_RESULT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        **_NO_OPS_SCHEMA,
        "type": {"const": "tool_result"},
        "tool_use_id": {"type": "string"},
        "content": {"anyOf": [*TEXT_SCHEMA["anyOf"], {"enum": [None, []]}]},
        "is_error": {"type": ["boolean", "null"]},
    },
    "required": ["type", "tool_use_id"],
    "additionalProperties": False,
}
MESSAGES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": ["user", "assistant"]},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "items": {
                            "anyOf": [TEXT_BLOCK_SCHEMA, _TOOL_USE_SCHEMA, _TOOL_RESULT_SCHEMA]
                        },
                        "minItems": 1,
                        "maxItems": MAX_CONTENT_PARTS,
                    },
                ]
            },
        },
        "required": ["role", "content"],
        "additionalProperties": False,
    },
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
}


@dataclass
class Turns:
    """Messages of a chat, as JSON, and what each is called in the request."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    _calls: set[str] = field(default_factory=set)
    _unanswered: dict[str, str] = field(default_factory=dict)

    def add_text(self, role: str, text: str, source: str) -> None:
        """Texts of one role that follow each other are one turn, as Anthropic has it. Text behind
        calls of the same message is put before them: a chat has no other place for it."""
        last = self.messages[-1] if self.messages else {}
        if role == "assistant" and last.get("role") == role and self.sources[-1] == source:
            last["content"] = [*(last["content"] or []), {"type": "text", "text": text}]
            return
        self.check_answered()
        self._calls.clear()
        if last.get("role") != role or "tool_calls" in last:
            last = {"role": role, "content": []}
            self.messages.append(last)
            self.sources.append(source)
        last["content"].append({"type": "text", "text": text})

    def add_call(self, call: dict[str, Any], source: str, param: str) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": None})
            self.sources.append(source)
            self.check_answered()
            self._calls.clear()
        self.messages[-1].setdefault("tool_calls", []).append(call)
        self._calls.add(call["id"])
        self._unanswered[call["id"]] = param

    def add_result(self, call_id: str, text: str, source: str, param: str) -> None:
        """Only the calls right before them have results."""
        if call_id not in self._calls:
            param = f"{param}.tool_use_id"
            raise InvalidRequest(
                f"{param} {call_id[:40]!r} is of no tool_use in the message before; send that "
                "block, too",
                param=param,
            )
        self._unanswered.pop(call_id, None)
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
        self.sources.append(source)

    def check_answered(self) -> None:
        """Each call has its result before the conversation goes on."""
        for call_id, param in self._unanswered.items():
            raise InvalidRequest(
                f"{param}: the tool_use {call_id[:40]!r} has no tool_result; begin the next "
                "message with one that has its tool_use_id",
                param=param,
            )


def read_messages(value: Any) -> Turns:
    """Raises `InvalidRequest` or `UnsupportedParameter` naming the block at fault."""
    if isinstance(value, Turns):
        return value
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise InvalidRequest(
            f"messages must be a list of 1 to {MAX_MESSAGES:,} messages", param="messages"
        )
    turns = Turns()
    for i, message in enumerate(value):
        _add_message(turns, message, f"messages[{i}]")
    turns.check_answered()
    return turns


def _add_message(turns: Turns, value: Any, param: str) -> None:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be an object with role and content", param=param)
    refuse_unknown(value := dict(value), frozenset({"role", "content"}), prefix=f"{param}.")
    role = text_of(value, "role", param)
    if role not in ("user", "assistant"):
        raise UnsupportedParameter(
            f"{param}.role {role[:20]!r} is not supported; use user or assistant (a system prompt "
            "goes to system)",
            param=f"{param}.role",
        )
    content = value.get("content")
    if isinstance(content, str):
        turns.add_text(role, content, param)
        return
    for i, block in enumerate(_blocks(content, f"{param}.content")):
        _add_block(turns, role, block, param, f"{param}.content[{i}]")


def _blocks(value: Any, param: str) -> list[Any]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_CONTENT_PARTS:
        raise InvalidRequest(
            f"{param} must be a text or a list of 1 to {MAX_CONTENT_PARTS:,} blocks", param=param
        )
    return value


def _add_block(turns: Turns, role: str, value: Any, source: str, param: str) -> None:
    kind = _kind(value, param)
    allowed = ("text", "tool_use") if role == "assistant" else ("text", "tool_result")
    if kind not in allowed:
        raise UnsupportedParameter(
            f"{param}: blocks of type {kind[:40]!r} are not supported in a message of the {role}, "
            f"only {' and '.join(allowed)}",
            param=param,
        )
    block = without_no_ops(value, _BLOCK_NO_OPS, prefix=f"{param}.")
    if kind == "text":
        turns.add_text(role, _text(block, param), source)
    elif kind == "tool_use":
        turns.add_call(_call(block, param), source, param)
    else:
        call_id, text = _result(block, param)
        turns.add_result(call_id, text, source, param)


def _kind(value: Any, param: str) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequest(f"{param} must be an object with a type", param=param)
    return kind


def _text(block: dict[str, Any], param: str) -> str:
    refuse_unknown(block, frozenset({"type", "text"}), prefix=f"{param}.")
    return text_of(block, "text", param)


def _call(block: dict[str, Any], param: str) -> dict[str, Any]:
    refuse_unknown(block, frozenset({"type", "id", "name", "input"}), prefix=f"{param}.")
    if not isinstance(block.get("input"), dict):
        raise InvalidRequest(f"{param}.input must be an object", param=f"{param}.input")
    return {
        "id": text_of(block, "id", param),
        "type": "function",
        "function": {
            "name": text_of(block, "name", param),
            "arguments": orjson.dumps(block["input"]).decode(),
        },
    }


def _result(block: dict[str, Any], param: str) -> tuple[str, str]:
    known = frozenset({"type", "tool_use_id", "content", "is_error"})
    refuse_unknown(block, known, prefix=f"{param}.")
    is_error = block.get("is_error")
    if not isinstance(is_error, bool | None):
        raise InvalidRequest(f"{param}.is_error must be true or false", param=f"{param}.is_error")
    content = block.get("content")
    text = "" if content in (None, []) else read_text(content, f"{param}.content")
    return text_of(block, "tool_use_id", param), (ERROR_MARK if is_error else "") + text


def read_text(value: Any, param: str) -> str:
    """A text, or the texts of blocks, each on lines of its own."""
    if isinstance(value, str):
        return value
    texts = []
    for i, block in enumerate(_blocks(value, param)):
        where = f"{param}[{i}]"
        if (kind := _kind(block, where)) != "text":
            raise UnsupportedParameter(
                f"{where}: blocks of type {kind[:40]!r} are not supported here, only text",
                param=where,
            )
        texts.append(_text(without_no_ops(block, _BLOCK_NO_OPS, prefix=f"{where}."), where))
    return "\n".join(texts)
