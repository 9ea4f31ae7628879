"""Jinja templates that models bring along: what they are given, and what is made of their text.

A template is foreign code: it sees plain strings, lists and dicts, and whoever renders it bounds
its operators, its output and its time (`jinja_sandbox.py`; a worker has it done by another process,
`render_process.py`). What a message says stays text: before rendering, every special token in it is
broken by a character that occurs nowhere else, which is taken out again after the result has been
cut at the special tokens that the template itself wrote.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from chatserve.errors import InvalidRequest, ModelLoadError
from chatserve.models.special_tokens import Rendered, Special, SpecialTokens
from chatserve.models.templates import ChatMessage
from chatserve.models.templates.jinja_sandbox import BadTemplate, CannotRender, Sandbox
from chatserve.models.tool_format import recognise

MAX_TEMPLATE_CHARS = 1 << 20
MAX_SCAFFOLD_CHARS = 1 << 20
# what a template that indents its tools may add to them
_INDENTS = 8
_SHORT_ID_CHARS = 9
# names and values that templates look for; they are no part of any special token
_FORM = frozenset({
    "arguments", "array", "boolean", "description", "enum", "function", "id", "integer", "items",
    "name", "number", "object", "parameters", "properties", "required", "role", "string",
    "tool_call_id", "tool_calls", "type",
})  # fmt: skip
# Noncharacters: valid in a Python string, never part of real text.
_SENTINELS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class Renderer(Protocol):
    """Whoever runs a template's code; one template each."""

    def compile(self, source: str) -> None:
        """Raises `BadTemplate`."""
        ...

    def render(self, max_chars: int, variables: Mapping[str, Any]) -> str:
        """A text of at most `max_chars`. Raises `CannotRender`."""
        ...


class JinjaTemplate:
    """The chat template of a tokenizer_config.json, chat_template.jinja or GGUF file.

    `names` are `bos_token` and its like. `renderer`: this process, unless another is given. Raises
    `ModelLoadError` for a template that is no Jinja.
    """

    adds_bos = False  # it writes bos_token itself, if the model wants one
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    special_tokens: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        source: str,
        special_tokens: SpecialTokens,
        names: Mapping[str, str],
        renderer: Renderer | None = None,
    ) -> None:
        self.name = name
        self._markers = special_tokens
        self._names = dict(names)
        self._renderer = renderer or Sandbox()
        _compile(self._renderer, name, source)
        self._sentinels = [mark for mark in _SENTINELS if mark not in source]
        self.tool_format = recognise(source)
        self._tools: Sequence[Mapping[str, Any]] = ()

    def offering(self, tools: Sequence[Mapping[str, Any]]) -> JinjaTemplate:
        """The same template, with tools in the form that it knows."""
        template = copy.copy(self)
        template._tools = tools
        return template

    def render(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> Rendered:
        try:
            return self._render(messages, add_generation_prompt, has_text_arguments=False)
        except InvalidRequest:
            if not any(getattr(message, "tool_calls", ()) for message in messages):
                raise
            # DeepSeek's templates put arguments together as texts
            return self._render(messages, add_generation_prompt, has_text_arguments=True)

    def _render(
        self,
        messages: Sequence[ChatMessage],
        add_generation_prompt: bool,
        *,
        has_text_arguments: bool,
    ) -> Rendered:
        turns = [self._turn(message, has_text_arguments) for message in messages]
        # all texts, those of tools and calls without escapes that could hide a character
        written = json.dumps([turns, self._tools], ensure_ascii=False)
        sentinel = self._absent_character(written)
        text = self._run(
            MAX_SCAFFOLD_CHARS + 4 * len(written) + _INDENTS * len(json.dumps(self._tools)),
            messages=[self._shielded_turn(turn, sentinel) for turn in turns],
            tools=[self._shielded(tool, sentinel) for tool in self._tools] or None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._names,
        )
        return [
            part if isinstance(part, Special) else clean
            for part in self._markers.split(text)
            if (clean := part.replace(sentinel, ""))
        ]

    def _turn(self, message: ChatMessage, has_text_arguments: bool) -> dict[str, Any]:
        """A message as templates know it; fields of tools only where there are any."""
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if calls := getattr(message, "tool_calls", ()):
            turn["tool_calls"] = [
                {
                    "type": "function",
                    "id": self._call_id(call.call_id),
                    "function": {
                        "name": call.name,
                        "arguments": json.dumps(call.arguments, ensure_ascii=False)
                        if has_text_arguments
                        else call.arguments,
                    },
                }
                for call in calls
            ]
        if message.role == "tool":
            turn["tool_call_id"] = self._call_id(getattr(message, "tool_call_id", None) or "")
            turn["name"] = getattr(message, "name", None) or ""
        return turn

    def _call_id(self, call_id: str) -> str:
        if self.tool_format is None or not self.tool_format.short_ids:
            return call_id
        if len(call_id) == _SHORT_ID_CHARS and call_id.isascii() and call_id.isalnum():
            return call_id
        return hashlib.sha256(call_id.encode()).hexdigest()[:_SHORT_ID_CHARS]

    def _shielded_turn(self, turn: dict[str, Any], sentinel: str) -> dict[str, Any]:
        rest = {name: value for name, value in turn.items() if name != "content"}
        # An assistant's own <think> and the like are part of its turn's form.
        content = self._markers.shield(
            turn["content"], sentinel, control_only=turn["role"] == "assistant"
        )
        return {"role": turn["role"], "content": content, **self._shielded(rest, sentinel)}

    def _shielded(self, value: Any, sentinel: str) -> Any:
        """`value` with all its texts shielded, names of fields, too."""
        if isinstance(value, str):
            if value in _FORM:
                return value
            return self._markers.shield(value, sentinel, control_only=False)
        if isinstance(value, Mapping):
            return {
                self._shielded(name, sentinel): self._shielded(each, sentinel)
                for name, each in value.items()
            }
        if isinstance(value, list):
            return [self._shielded(each, sentinel) for each in value]
        return value

    def _absent_character(self, written: str) -> str:
        for sentinel in self._sentinels:
            if sentinel not in written:
                return sentinel
        raise InvalidRequest(
            "the messages hold every Unicode noncharacter from U+FDD0 to U+FDEF; remove them",
            param="messages",
        )

    def _run(self, max_chars: int, **variables: Any) -> str:
        try:
            text = self._renderer.render(max_chars, variables)
        except CannotRender as error:
            reason = str(error)
            for mark in self._sentinels:
                reason = reason.replace(mark, "")
            raise InvalidRequest(
                f"the model's own chat template cannot render this chat: {reason}",
                param="messages",
            ) from error
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidRequest(
                "the model's own chat template writes half of a surrogate pair, which is not valid "
                "Unicode; choose another with --conv-template",
                param="messages",
            ) from None
        return text


def _compile(renderer: Renderer, name: str, source: str) -> None:
    if len(source) > MAX_TEMPLATE_CHARS:
        raise ModelLoadError(
            f"the chat template {name!r} has {len(source):,} characters, over the limit of "
            f"{MAX_TEMPLATE_CHARS:,}; choose another with --conv-template"
        )
    try:
        renderer.compile(source)
    except BadTemplate as error:
        raise ModelLoadError(
            f"the chat template {name!r} {error}; choose another with --conv-template"
        ) from error
