"""Jinja templates that models bring along, rendered in a sandbox. jinja2 is imported on use.

A template is foreign code: it sees plain strings, lists and dicts; its operators, its output and
its time are bounded. What a message says stays text: before rendering, every special token in it is
broken by a character that occurs nowhere else, which is taken out again after the result has been
cut at the special tokens that the template itself wrote.
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from chatserve.errors import InvalidRequest, ModelLoadError
from chatserve.models.special_tokens import Rendered, Special, SpecialTokens
from chatserve.models.templates import ChatMessage, jinja_bounds
from chatserve.models.tool_format import recognise

MAX_TEMPLATE_CHARS = 1 << 20
MAX_SCAFFOLD_CHARS = 1 << 20
MAX_RENDER_S = 1.0
_ESCAPED_SENTINEL = re.compile(r"(?<!\\)((?:\\\\)*)\\u(fd[de][0-9a-f])")
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


class JinjaTemplate:
    """The chat template of a tokenizer_config.json, chat_template.jinja or GGUF file.

    `names` are `bos_token` and its like. Raises `ModelLoadError` for a template that is no Jinja.
    """

    adds_bos = False  # it writes bos_token itself, if the model wants one
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    special_tokens: tuple[str, ...] = ()

    def __init__(
        self, name: str, source: str, special_tokens: SpecialTokens, names: Mapping[str, str]
    ) -> None:
        self.name = name
        self._markers = special_tokens
        self._names = dict(names)
        self._template = _compile(name, source)
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

    def _run(self, limit: int, **variables: Any) -> str:
        import jinja2

        pieces: list[str] = []
        length = 0
        try:
            with jinja_bounds.budget(limit, MAX_RENDER_S):
                for piece in self._template.generate(**variables):
                    pieces.append(piece)
                    length += len(piece)
                    if length > limit:
                        raise jinja2.exceptions.SecurityError(
                            f"it writes more than {limit:,} characters"
                        )
        except (
            jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError,
            RecursionError, TypeError, ValueError,
        ) as error:  # fmt: skip
            reason = " ".join(str(error).split())[:300]
            for mark in self._sentinels:
                reason = reason.replace(mark, "")
            raise InvalidRequest(
                f"the model's own chat template cannot render this chat: {reason}",
                param="messages",
            ) from error
        text = "".join(pieces)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidRequest(
                "the model's own chat template writes half of a surrogate pair, which is not valid "
                "Unicode; choose another with --conv-template",
                param="messages",
            ) from None
        return text


def _compile(name: str, source: str) -> Any:
    import jinja2

    if len(source) > MAX_TEMPLATE_CHARS:
        raise ModelLoadError(
            f"the chat template {name!r} has {len(source):,} characters, over the limit of "
            f"{MAX_TEMPLATE_CHARS:,}; choose another with --conv-template"
        )
    try:
        return _environment().from_string(source)
    except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ModelLoadError(
            f"the chat template {name!r} is not valid Jinja ({error}); "
            "choose another with --conv-template"
        ) from error


def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates, with bounded operators."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """`{% generation %}` marks training targets; its body is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012, the base class declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Bounds(NodeTransformer):
        """Makes whatever may be large or slow a call, because calls are checked."""

        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = _call_of("timed", [node.iter])
            node.body.insert(0, jinja2.nodes.ExprStmt(_call_of("check_time", [])))
            return node

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return _call_of("join_texts", node.nodes)

        def visit_Compare(self, node: Any) -> Any:
            return _call_of("timed", [self.generic_visit(node)])

        def visit_Getitem(self, node: Any) -> Any:
            is_slice = isinstance(node.arg, jinja2.nodes.Slice)
            self.generic_visit(node)
            return _call_of("spent", [node]) if is_slice else node

        def visit_List(self, node: Any) -> Any:
            return _call_of("spent", [self.generic_visit(node)])

        def visit_Tuple(self, node: Any) -> Any:
            self.generic_visit(node)
            return _call_of("spent", [node]) if node.ctx == "load" else node

        visit_Dict = visit_List

    class Namespace(jinja2.utils.Namespace):
        """As jinja's, but its text does not spell out what it holds."""

        def __repr__(self) -> str:
            return "<Namespace>"

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "+", "%"})
        check_time = staticmethod(jinja_bounds.check_time)
        timed = staticmethod(jinja_bounds.timed)
        spent = staticmethod(jinja_bounds.spent)
        join_texts = staticmethod(jinja_bounds.join_texts)
        concat = staticmethod(jinja_bounds.concat)

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            tree = Bounds().visit(super()._parse(source, name, filename))
            return tree.set_environment(self)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            refused = attr in jinja_bounds.REFUSED_METHODS and callable(value)
            return not refused and super().is_safe_attribute(obj, attr, value)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            jinja_bounds.check_operands(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, /, *arguments: Any, **options: Any) -> Any:
            if function in (self.check_time, self.timed, self.spent, self.join_texts):
                return function(*arguments)
            arguments = jinja_bounds.checked_arguments(function, arguments, options)
            return jinja_bounds.spent(super().call(context, function, *arguments, **options))

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
        finalize=jinja_bounds.fitting,
    )
    del environment.globals["lipsum"]
    environment.globals["namespace"] = Namespace
    environment.filters["tojson"] = _tojson
    environment.filters = jinja_bounds.bounded_filters(environment.filters)
    environment.tests = jinja_bounds.timed_calls(environment.tests)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _call_of(name: str, arguments: list[Any]) -> Any:
    from jinja2 import nodes

    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which models have not been trained on.
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if not ensure_ascii:
        return text
    # what breaks special tokens is taken out again as a character, not as its escape
    return _ESCAPED_SENTINEL.sub(lambda match: match[1] + chr(int(match[2], 16)), text)


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
