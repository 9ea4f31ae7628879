"""Chats with tools, for templates that know none: tools, calls and results become plain messages.

A system message lists the tools and shows the format; a call is an answer, a result is what the
user says next. Content that imitates their marks is changed by one space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from chatserve.errors import InvalidRequest
from chatserve.models.special_tokens import Rendered
from chatserve.models.templates import ChatMessage, ChatTemplate
from chatserve.models.templates.jinja import JinjaTemplate
from chatserve.models.templates.plain import ColonTemplate, RoleMarks
from chatserve.models.tool_format import WORDS, ToolFormat

ToolDefinitions = Sequence[Mapping[str, Any]]

_SECTION = """\
You can call the tools that are listed here, each with the JSON Schema of its arguments:
<tools>
{tools}
</tools>
To call one, answer with its name and its arguments as JSON, between these tags:
<tool_call>
{{"name": "NAME", "arguments": {{...}}}}
</tool_call>
Another call may follow right behind it. The results come back between <tool_response> and \
</tool_response>. Without need for a tool answer in plain text."""
_MARK = r"<(?=/?(?:tools|tool_call|tool_response)>)"
_TEXT_MARKS = RoleMarks(re.compile(_MARK), "< ")
# inside of JSON the same character can be written in another way
_JSON_MARKS = RoleMarks(re.compile(_MARK), r"\\u003c")


class ToolCall(Protocol):
    """What the assistant has asked for."""

    @property
    def call_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def arguments(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class _Plain:
    role: str
    content: str


def calls_of(message: ChatMessage) -> Sequence[ToolCall]:
    """Most messages are of kinds that have none."""
    calls: Sequence[ToolCall] = getattr(message, "tool_calls", ())
    return calls


def has_tools(messages: Sequence[ChatMessage]) -> bool:
    """Whether a chat has calls or results."""
    return any(message.role == "tool" or calls_of(message) for message in messages)


def tool_format_of(template: ChatTemplate) -> ToolFormat:
    """How models with this template are to write their calls."""
    own = template.tool_format if isinstance(template, JinjaTemplate) else None
    return own or WORDS


def with_tools(template: ChatTemplate, tools: ToolDefinitions) -> ChatTemplate:
    """The template for chats with calls and results, that offers `tools`."""
    if isinstance(template, JinjaTemplate) and template.tool_format is not None:
        return template.offering(tools)
    return DescribedTools(template, tools)


class DescribedTools:
    """`template`, with tools put into words."""

    def __init__(self, template: ChatTemplate, tools: ToolDefinitions) -> None:
        self._template = template
        self._section = _section(tools) if tools else ""
        self.name = template.name
        self.adds_bos = template.adds_bos
        self.stop = template.stop
        self.stop_tokens = template.stop_tokens
        self.special_tokens = template.special_tokens

    def render(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> Rendered:
        plain = list(_plain(messages))
        if not self._section:
            return self._template.render(plain, add_generation_prompt=add_generation_prompt)
        try:
            return self._template.render(
                self._with_system(plain), add_generation_prompt=add_generation_prompt
            )
        except InvalidRequest:
            if not plain or plain[0].role != "user":
                raise
        # some templates have no place for a system message
        first = _Plain("user", f"{self._section}\n\n{plain[0].content}")
        return self._template.render(
            [first, *plain[1:]], add_generation_prompt=add_generation_prompt
        )

    def _with_system(self, messages: Sequence[_Plain]) -> list[_Plain]:
        """The section behind what the system says, or would say."""
        system = self._template.system if isinstance(self._template, ColonTemplate) else ""
        if messages and messages[0].role == "system":
            system, messages = messages[0].content, messages[1:]
        content = f"{system}\n\n{self._section}" if system else self._section
        return [_Plain("system", content), *messages]


def _section(tools: ToolDefinitions) -> str:
    lines = (_json(tool["function"]) for tool in tools)
    return _SECTION.format(tools="\n".join(lines))


def _plain(messages: Sequence[ChatMessage]) -> Sequence[_Plain]:
    """Messages of system, user and assistant only; results in a row are one message of the user,
    and so is what the user says to them."""
    plain: list[_Plain] = []
    follows_result = False
    for message in messages:
        content = _TEXT_MARKS.escape(message.content)
        role = message.role
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        if calls := calls_of(message):
            content = f"{content}\n" * bool(content) + "".join(map(_call, calls))
        if role == "user" and follows_result:
            content = f"{plain.pop().content}\n{content}"
        plain.append(_Plain(role, content))
        follows_result = message.role == "tool" or (role == "user" and follows_result)
    return plain


def _call(call: ToolCall) -> str:
    asked = _json({"name": call.name, "arguments": call.arguments})
    return f"<tool_call>\n{asked}\n</tool_call>"


def _json(value: Any) -> str:
    return _JSON_MARKS.escape(json.dumps(value, ensure_ascii=False))
