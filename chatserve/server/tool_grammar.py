"""The grammar of an answer that may or must call tools: names that exist, arguments that match.

Text to text; compiles nothing. What is not a call is free text, so a model that need not call
anything answers as if there was no grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from chatserve.errors import UnsupportedParameter
from chatserve.grammar.source import JSON_OPTIONS
from chatserve.models.tool_format import ToolFormat
from chatserve.protocol.chat import ChatRequest
from chatserve.protocol.response_format import GrammarSpec
from chatserve.protocol.tools import Tool

MAX_CALLS: Final = 16
"""In one answer."""
_ANY_TEXT = r"/(.|\n)*/"
_REGEX_SIGNS = re.compile(r"[\\/.+*?()|\[\]{}^$]")


def tool_grammar(
    request: ChatRequest,
    tool_format: ToolFormat,
    *,
    control_id: int | None = None,
    after_space: bool = False,
) -> GrammarSpec:
    """What an answer to `request`, which offers tools, must match.

    control_id: of the special token that may come before its calls. after_space: the answer begins
    with a space that is taken away before anybody sees it. Raises `UnsupportedParameter` for a
    format of the answer that cannot be told from a call.
    """
    choice = request.tool_choice
    tools = [tool for tool in request.tools if choice.names is None or tool.name in choice.names]
    rules = _calls(tool_format, tools, _max_calls(request, tool_format))
    body = "calls"
    if choice.mode == "auto":
        body, more = _text_or_calls(tool_format, _text_schema(request, tool_format))
        rules += more
    start = f'" " ({body})' if after_space else body
    if control_id is not None:
        start += f' | <[{control_id}]> " "? calls'
    return GrammarSpec("tools", "\n".join([f"start: {start}", *rules]), "tools")


def _max_calls(request: ChatRequest, tool_format: ToolFormat) -> int:
    is_single = request.tool_choice.is_single or request.parallel_tool_calls is False
    return 1 if is_single or not tool_format.between else MAX_CALLS


def _calls(tool_format: ToolFormat, tools: Sequence[Tool], most: int) -> list[str]:
    """Rules for `calls`, and for `first`: the same without the marker."""
    first = _text(tool_format.before_name), "call"
    more = f"({_text(tool_format.between)} call){{0,{most - 1}}}" if most > 1 else ""
    rules = [
        f"calls: {_text(tool_format.marker)} first",
        " ".join(["first:", *filter(None, (*first, more, _text(tool_format.end)))]),
        f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}",
    ]
    for i, tool in enumerate(tools):
        before, after = tool.name + tool_format.before_arguments, tool_format.after_call
        rules.append(f"call_{i}: {_text(before)} arguments_{i} {_text(after)}")
        rules.append(f"arguments_{i}: {_json(tool.schema)}")
    return rules


def _text_or_calls(
    tool_format: ToolFormat, schema: Mapping[str, Any] | None
) -> tuple[str, list[str]]:
    """What an answer may be, and the rules of its text."""
    if schema is not None:
        return "json | calls", [f"json: {_json(schema)}"]
    if tool_format.follows_text:
        # the shortest text that ends with the marker: no text has one inside
        head = f"head[lazy]: TEXT {_text(tool_format.marker)}"
        return "TEXT | head first", [f"TEXT: {_ANY_TEXT}", head]
    marker = _REGEX_SIGNS.sub(r"\\\g<0>", tool_format.marker)
    return "TEXT | calls", [f"TEXT: {_ANY_TEXT} & ~/ ?{marker}(.|\\n)*/"]


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


def _text(literal: str) -> str:
    return json.dumps(literal, ensure_ascii=False) if literal else ""
