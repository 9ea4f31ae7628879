"""Jinja's sandbox as models' own templates get it: compiled here, rendered to text here.

Imports neither tokenizers nor torch: the process that renders for a worker is this and little else
(`render.py`). jinja2 is imported on use. Knows no message and no special token.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from chatserve.models.templates import jinja_bounds

MAX_RENDER_S = 1.0
MAX_REASON_CHARS = 300
_ESCAPED_SENTINEL = re.compile(r"(?<!\\)((?:\\\\)*)\\u(fd[de][0-9a-f])")


class BadTemplate(Exception):
    """A source that is no Jinja, or takes too much to compile; says so behind the name."""


class CannotRender(Exception):
    """A template fails, refuses the chat, or takes too much; says why, with words of the chat."""


class Sandbox:
    """Renders in this process, with bounds on every operator."""

    def __init__(self) -> None:
        self._template: Any = None

    def compile(self, source: str) -> None:
        """Make `source` what is rendered from now on. Raises `BadTemplate`."""
        import jinja2

        try:
            self._template = _environment().from_string(source)
        except (
            jinja2.TemplateError,
            SyntaxError,
            ValueError,
            RecursionError,
            MemoryError,
        ) as error:
            raise BadTemplate(f"is not valid Jinja ({_reason(error)})") from error

    def render(self, max_chars: int, variables: Mapping[str, Any]) -> str:
        """Raises `CannotRender`."""
        import jinja2

        try:
            with jinja_bounds.budget(max_chars, MAX_RENDER_S):
                return _joined(self._template.generate(**variables), max_chars)
        except (
            jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError,
            RecursionError, TypeError, ValueError,
        ) as error:  # fmt: skip
            raise CannotRender(_reason(error)) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:MAX_REASON_CHARS] or type(error).__name__


def _joined(pieces: Iterable[str], max_chars: int) -> str:
    kept: list[str] = []
    length = 0
    for piece in pieces:
        kept.append(piece)
        length += len(piece)
        if length > max_chars:
            raise CannotRender(f"it writes more than {max_chars:,} characters")
    return "".join(kept)


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
