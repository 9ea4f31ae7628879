"""The grammar of an answer that may or must call tools: names that exist, arguments that match.

Text to text; compiles nothing. What is not a call is free text, so a model that need not call
anything answers as if there was no grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from chatserve.errors import UnsupportedParameter
from chatserve.grammar.source import JSON_OPTIONS
from chatserve.models.tool_format import CALL_ID, ArgumentTags, ToolFormat
from chatserve.protocol.chat import ChatRequest
from chatserve.protocol.response_format import GrammarSpec
from chatserve.protocol.tools import Tool
from chatserve.server.tagged_arguments import NULL, PARAM, Argument, arguments_of

MAX_CALLS: Final = 16
"""In one answer."""
_ANY_TEXT = r"/(.|\n)*/"
_REGEX_SIGNS = re.compile(r"[\\/.+*?()|\[\]{}^$]")


class _Spelling:
    """How a format's texts are written; `marks` are special tokens with their ids."""

    def __init__(self, marks: Mapping[str, int]) -> None:
        self.marks = marks
        self._parts = re.compile("|".join(["(" + re.escape(CALL_ID), *map(re.escape, marks)]) + ")")

    def __call__(self, literal: str) -> str:
        return " ".join(self._part(part) for part in self._parts.split(literal) if part)

    def _part(self, part: str) -> str:
        if part == CALL_ID:
            return f"/[A-Za-z0-9]{{{len(CALL_ID)}}}/"
        return f"<[{self.marks[part]}]>" if part in self.marks else _quoted(part)


def tool_grammar(
    request: ChatRequest,
    tool_format: ToolFormat,
    *,
    control_id: int | None = None,
    marks: Mapping[str, int] = MappingProxyType({}),
    after_space: bool = False,
) -> GrammarSpec:
    """What an answer to `request`, which offers tools, must match.

    control_id: of the special token that may come before its calls. marks: texts of the format that
    are special tokens. after_space: the answer begins with a space that is taken away before
    anybody sees it. Raises `UnsupportedParameter` for a format of the answer that cannot be told
    from a call, and for arguments that the format cannot say.
    """
    spell = _Spelling(marks)
    rules = _calls(tool_format, request, spell)
    body = "calls"
    if request.tool_choice.mode == "auto":
        body, more = _text_or_calls(tool_format, _text_schema(request, tool_format), spell)
        rules += more
    start = f'" " ({body})' if after_space else body
    if control_id is not None:
        start += f' | <[{control_id}]> " "? calls'
    return GrammarSpec("tools", "\n".join([f"start: {start}", *rules]), "tools")


def _max_calls(request: ChatRequest, tool_format: ToolFormat) -> int:
    is_single = request.tool_choice.is_single or request.parallel_tool_calls is False
    return 1 if is_single or not tool_format.between else MAX_CALLS


def _calls(tool_format: ToolFormat, request: ChatRequest, spell: _Spelling) -> list[str]:
    """Rules for `calls`, and for `first`: the same without the marker."""
    names, most = request.tool_choice.names, _max_calls(request, tool_format)
    tools = [each for each in enumerate(request.tools) if names is None or each[1].name in names]
    first = spell(tool_format.before_name), "call"
    more = f"({spell(tool_format.between)} call){{0,{most - 1}}}" if most > 1 else ""
    rules = [
        f"calls: {spell(tool_format.marker)} first",
        " ".join(["first:", *filter(None, (*first, more, spell(tool_format.end)))]),
        f"call: {' | '.join(f'call_{i}' for i, _ in tools)}",
    ]
    for i, tool in tools:
        before = spell(tool.name + tool_format.before_arguments)
        rules.append(f"call_{i}: {before} arguments_{i} {spell(tool_format.after_call)}")
        if tool_format.tags is None:
            rules.append(f"arguments_{i}: {_json(tool.schema)}")
        else:
            rules += _tagged(i, tool, tool_format.tags, spell)
    return rules


def _tagged(i: int, tool: Tool, tags: ArgumentTags, spell: _Spelling) -> list[str]:
    """Rules for arguments one by one, in the order of the schema."""
    arguments = arguments_of(tool, PARAM.format(i), tags.end)
    parts = [f"argument_{i}_{j}{'?' * (not a.is_required)}" for j, a in enumerate(arguments)]
    rules = [" ".join([f"arguments_{i}:", *(parts or ['""'])])]
    for j, argument in enumerate(arguments):
        before = spell(tags.before_key + argument.name + tags.after_key)
        values, more = _values(f"{i}_{j}", argument, tags, spell)
        rules.append(f"argument_{i}_{j}: {before} ({values})")
        rules += more
    return rules


def _values(
    place: str, argument: Argument, tags: ArgumentTags, spell: _Spelling
) -> tuple[str, list[str]]:
    """What an argument may be, with what ends it; and the rules for that."""
    if argument.kind == "json":
        return f"{_json(argument.schema)} {spell(tags.after_value)}", []
    null = [spell(NULL + tags.after_value)] * (argument.kind == "text or null")
    if argument.texts:
        return " | ".join([*(spell(each + tags.after_value) for each in argument.texts), *null]), []
    least, most = argument.lengths
    times = "*" if (least, most) == (0, None) else f"{{{least},{'' if most is None else most}}}"
    has_null = least <= len(NULL) and (most is None or len(NULL) <= most)
    text = f"TEXT_{place}: /(.|\\n){times}/ & {_without(tags.end)}"
    values = [f"text_{place}", *([] if has_null else null)]
    if tags.end in spell.marks:
        # such a token ends any text
        return " | ".join(values), [text, f"text_{place}: TEXT_{place} {spell(tags.after_value)}"]
    # the shortest text that ends so: none has it inside
    ended = f"text_{place}[lazy]: TEXT_{place} {spell(tags.after_value)}"
    return " | ".join(values), [text, ended]


def _text_or_calls(
    tool_format: ToolFormat, schema: Mapping[str, Any] | None, spell: _Spelling
) -> tuple[str, list[str]]:
    """What an answer may be, and the rules of its text."""
    if schema is not None:
        return "json | calls", [f"json: {_json(schema)}"]
    marker = tool_format.marker
    if tool_format.follows_text and marker in spell.marks:
        # the same in letters would be read as a call
        return "TEXT | TEXT? calls", [f"TEXT: {_ANY_TEXT} & {_without(marker)}"]
    if tool_format.follows_text:
        # the shortest text that ends with the marker: no text has one inside
        head = f"head[lazy]: TEXT {spell(marker)}"
        return "TEXT | head first", [f"TEXT: {_ANY_TEXT}", head]
    return "TEXT | calls", [f"TEXT: {_ANY_TEXT} & ~/ ?{_escaped(marker)}(.|\\n)*/"]


def _text_schema(request: ChatRequest, tool_format: ToolFormat) -> Mapping[str, Any] | None:
    """The schema of an answer that is no call, if it is to be JSON."""
    spec = request.grammar
    if spec is None:
        return None
    if spec.kind not in ("json_object", "json_schema") or not tool_format.follows_text:
        raise UnsupportedParameter(
            f"{spec.param} cannot be combined with tools that this model may call; set tool_choice "
            "to required or none, or leave one out",
            param=spec.param,
        )
    schema: dict[str, Any] = json.loads(spec.source) if spec.source else {"type": "object"}
    return schema


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": JSON_OPTIONS}, ensure_ascii=False)


def _without(literal: str) -> str:
    return f"~/(.|\\n)*{_escaped(literal)}(.|\\n)*/"


def _escaped(literal: str) -> str:
    return _REGEX_SIGNS.sub(r"\\\g<0>", literal)


def _quoted(literal: str) -> str:
    return json.dumps(literal, ensure_ascii=False)
