"""Jinja templates that models bring along, rendered in a sandbox. jinja2 is imported on use.

A template is foreign code: it sees plain strings, lists and dicts; its operators, its output and
its time are bounded. What a message says stays text: before rendering, every special token in it is
broken by a character that occurs nowhere else, which is taken out again after the result has been
cut at the special tokens that the template itself wrote.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn

from chatserve.errors import InvalidRequest, ModelLoadError
from chatserve.models.special_tokens import Rendered, Special, SpecialTokens
from chatserve.models.templates import ChatMessage

MAX_TEMPLATE_CHARS = 1 << 20
MAX_SCAFFOLD_CHARS = 1 << 20
MAX_RENDER_S = 1.0
_MAX_EXPONENT = 64
_WIDTH_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_PERCENT_WIDTHS = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\d*)(?:\.(\d+))?")
_BRACE_WIDTHS = re.compile(r"(\d+)")
_limit: ContextVar[tuple[int, float]] = ContextVar("limit")
"""Of the rendering in progress: characters of one value, and when its thread's time is over."""
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

    def render(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> Rendered:
        sentinel = self._absent_character(messages)
        chat = [
            {
                "role": message.role,
                # An assistant's own <think> and the like are part of its turn's form.
                "content": self._markers.shield(
                    message.content, sentinel, control_only=message.role == "assistant"
                ),
            }
            for message in messages
        ]
        text = self._run(
            MAX_SCAFFOLD_CHARS + 2 * sum(len(message["content"]) for message in chat),
            messages=chat,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._names,
        )
        return [
            part if isinstance(part, Special) else clean
            for part in self._markers.split(text)
            if (clean := part.replace(sentinel, ""))
        ]

    def _absent_character(self, messages: Sequence[ChatMessage]) -> str:
        for sentinel in self._sentinels:
            if not any(sentinel in message.content for message in messages):
                return sentinel
        raise InvalidRequest(
            "the messages hold every Unicode noncharacter from U+FDD0 to U+FDEF; remove them",
            param="messages",
        )

    def _run(self, limit: int, **variables: Any) -> str:
        import jinja2

        pieces: list[str] = []
        length = 0
        # The thread's own time: a busy machine must not make an honest template fail.
        token = _limit.set((limit, time.thread_time() + MAX_RENDER_S))
        try:
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
        finally:
            _limit.reset(token)
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
        """Makes every turn of a loop and every `~` a call, because calls are checked."""

        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.body.insert(0, jinja2.nodes.ExprStmt(_call_of("check_time", [])))
            return node

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return _call_of("join_texts", node.nodes)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "+", "%"})
        check_time = staticmethod(_check_time)
        join_texts = staticmethod(_join_texts)

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            tree = Bounds().visit(super()._parse(source, name, filename))
            return tree.set_environment(self)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, /, *arguments: Any, **options: Any) -> Any:
            _check_time()
            _check_method(function, arguments, options)
            return super().call(context, function, *arguments, **options)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    del environment.globals["lipsum"]
    for name in ("center", "indent", "wordwrap", "truncate", "round", "batch", "slice"):
        environment.filters[name] = _bounded(environment.filters[name])
    environment.filters["replace"] = _bounded_replace(environment.filters["replace"])
    environment.filters["join"] = _bounded_join(environment.filters["join"])
    environment.filters["format"] = _format
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _check_operands(operator: str, left: Any, right: Any) -> None:
    from jinja2.exceptions import SecurityError

    if operator == "**":
        if not isinstance(right, (int, float)) or abs(right) > _MAX_EXPONENT:
            raise SecurityError(f"exponents over {_MAX_EXPONENT} are not allowed")
        return
    if operator == "+":
        for kind in (str, list, tuple):
            if isinstance(left, kind) and isinstance(right, kind):
                _check_length(len(left) + len(right))
        return
    if operator == "%":
        if isinstance(left, str):
            _check_widths(left, right)
        return
    for sequence, times in ((left, right), (right, left)):
        if (
            isinstance(sequence, (str, list, tuple))
            and isinstance(times, int)
            and len(sequence) * times > MAX_SCAFFOLD_CHARS
        ):
            raise SecurityError(f"repeating to over {MAX_SCAFFOLD_CHARS:,} items is not allowed")


def _call_of(name: str, arguments: list[Any]) -> Any:
    from jinja2 import nodes

    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


def _check_time() -> None:
    from jinja2.exceptions import SecurityError

    if time.thread_time() > _limit.get()[1]:
        raise SecurityError(f"it computes for more than {MAX_RENDER_S:g} s")


def _check_length(length: int) -> None:
    from jinja2.exceptions import SecurityError

    limit = _limit.get()[0]
    if length > limit:
        raise SecurityError(f"it makes a value of more than {limit:,} characters or items")


def _join_texts(*values: Any) -> str:
    texts = [str(value) for value in values]
    _check_length(sum(map(len, texts)))
    return "".join(texts)


def _check_widths(pattern: str, values: Any) -> None:
    """Bound the result of `pattern % values`: its own widths, and the texts that it repeats."""
    from jinja2.exceptions import SecurityError

    if re.search(r"%[^%a-zA-Z]*\*", pattern):
        raise SecurityError("a width that is itself an argument is not allowed")
    if isinstance(values, dict):
        values = list(values.values())
    texts = values if isinstance(values, (tuple, list)) else [values]
    widths = [digits for pair in _PERCENT_WIDTHS.findall(pattern) for digits in pair]
    _check_length(len(pattern) + _sum(widths) + pattern.count("%") * _longest(texts))


def _check_braces(pattern: str, values: Sequence[Any]) -> None:
    """The same for `pattern.format(values)`, where a number among the values may be a width."""
    if re.search(r":[^}]*\{", pattern):
        _check_length(max((abs(value) for value in values if isinstance(value, int)), default=0))
    widths = _BRACE_WIDTHS.findall("".join(re.findall(r"\{[^{}]*[:.][^{}]*", pattern)))
    _check_length(len(pattern) + _sum(widths) + pattern.count("{") * _longest(values))


def _sum(numbers: Sequence[str]) -> int:
    # Over every limit from ten digits on; int() refuses very long numbers.
    return sum(int(digits) if len(digits) < 10 else 10**10 for digits in numbers if digits)


def _longest(values: Sequence[Any]) -> int:
    return max((len(value) for value in values if isinstance(value, str)), default=0)


def _format(value: Any, *arguments: Any, **options: Any) -> str:
    """Jinja's filter `format`, bounded."""
    _check_widths(str(value), options or arguments)
    return str(str(value) % (options or arguments))


def _check_method(function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Bound what the methods of strings can make of little."""
    # The sandbox wraps str.format, so that its method is one step further.
    function = getattr(function, "__wrapped__", function)
    text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(text, str):
        return
    if name in _WIDTH_METHODS:
        times = text.count("\t") if name == "expandtabs" else 1
        for width in arguments:
            if isinstance(width, int):
                _check_length(len(text) + width * times)
    elif name == "join" and arguments and isinstance(arguments[0], (list, tuple)):
        _check_joined(arguments[0], text)
    elif name == "format":
        _check_braces(text, [*arguments, *options.values()])
    elif name == "replace" and len(arguments) >= 2:
        _check_replaced(text, *arguments[:2])


def _check_replaced(text: Any, old: Any, new: Any) -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        _check_length(len(text) + text.count(old) * len(new))


def _check_joined(values: Sequence[Any], separator: str) -> None:
    texts = (len(value) for value in values if isinstance(value, str))
    _check_length(sum(texts) + len(separator) * len(values))


def _bounded_replace(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def replace(context: Any, text: Any, old: Any, new: Any, count: int | None = None) -> Any:
        _check_replaced(text, old, new)
        return function(context, text, old, new, count)

    return replace


def _bounded_join(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def join(context: Any, values: Any, d: str = "", attribute: Any = None) -> Any:
        values = list(values)
        _check_joined(values, str(d))
        return function(context, values, d, attribute)

    return join


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter with its numbers bounded; `wraps` keeps jinja's mark of its first argument."""

    @functools.wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        for value in (*arguments, *options.values()):
            if isinstance(value, int):
                _check_length(value)
        return function(*arguments, **options)

    return checked


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which models have not been trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
