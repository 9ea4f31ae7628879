"""What a model's own Jinja template may spend: the size of each value, of all together, and time.

Knows no template and no environment; `jinja.py` puts these checks around every operation that makes
something large of something small, or that takes long. Each raises jinja2's `SecurityError`.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

# Values in all, as multiples of the limit of one: a text may grow message by message.
_MAX_VALUES = 64
_MAX_EXPONENT = 64
_MAX_INT_BITS = 1 << 12
_ITEM_CHARS = 4  # what an item of a list counts beside its own size: "', '" when it is written out
# Slow or large beyond any bound that fits here, and of no use to a chat.
REFUSED_FILTERS = ("pprint", "urlize", "wordwrap")
# Ways to bytes, whose methods are not bounded, and to texts of any size.
REFUSED_METHODS = frozenset(
    {"encode", "from_bytes", "fromhex", "maketrans", "to_bytes", "translate"}
)
_WIDTH_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_PERCENT_WIDTHS = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\d*)(?:\.(\d+))?")
_BRACE_WIDTHS = re.compile(r"(\d+)")


@dataclass
class _Budget:
    """Of the rendering in progress. max_chars: of one value; deadline_s: of its thread's time."""

    max_chars: int
    max_s: float
    deadline_s: float
    spent_chars: int = 0


_budget: ContextVar[_Budget] = ContextVar("budget")


@contextmanager
def budget(max_chars: int, max_s: float) -> Iterator[None]:
    """The limits of what runs inside. The thread's own time counts: a busy machine must not make
    an honest template fail."""
    token = _budget.set(_Budget(max_chars, max_s, time.thread_time() + max_s))
    try:
        yield
    finally:
        _budget.reset(token)


def _refuse(reason: str) -> NoReturn:
    from jinja2.exceptions import SecurityError

    raise SecurityError(reason)


def check_time() -> None:
    limits = _budget.get()
    if time.thread_time() > limits.deadline_s:
        _refuse(f"it computes for more than {limits.max_s:g} s")


def check_length(length: int) -> None:
    limit = _budget.get().max_chars
    if length > limit:
        _refuse(f"it makes a value of more than {limit:,} characters or items")


def timed(value: Any) -> Any:
    """`value`, if there is time left."""
    check_time()
    return value


def fitting(value: Any) -> Any:
    """`value`, if its text is not too long."""
    check_length(_size(value))
    return value


def spent(value: Any) -> Any:
    """`value`, which has just been made, if it and all before it are not too large."""
    _spend(_size(value))
    return value


def _spend(num_chars: int) -> None:
    check_time()
    check_length(num_chars)
    limits = _budget.get()
    limits.spent_chars += num_chars
    if limits.spent_chars > _MAX_VALUES * limits.max_chars:
        _refuse(f"it makes values of {limits.spent_chars:,} characters or items in all")


def _size(value: Any, known: dict[int, int] | None = None) -> int:
    """About the characters of `str(value)`.

    A list that holds the same list twice counts it twice, as its text does; each is visited once.
    """
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3 + 1
    if isinstance(value, Mapping):
        items: Iterable[Any] = chain(value.keys(), value.values())
    elif isinstance(value, (list, tuple, AbstractSet, KeysView, ValuesView, ItemsView)):
        items = value
    else:
        return 1
    known = {} if known is None else known
    size = known.get(id(value))
    if size is None:
        size = known[id(value)] = sum(_ITEM_CHARS + _size(item, known) for item in items)
    return size


def join_texts(*values: Any) -> str:
    """Jinja's operator `~`."""
    _spend(sum(map(_size, values)))
    return "".join(map(str, values))


def concat(pieces: Iterable[str]) -> str:
    """What a macro, a block or a `set` block has written."""
    pieces = list(pieces)
    _spend(sum(map(len, pieces)))
    return "".join(pieces)


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Bound `left operator right` for `*`, `**`, `+` and `%`."""
    if operator == "%":
        if isinstance(left, str):
            _check_widths(left, right)
    elif operator == "+":
        if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            _spend(_size(left) + _size(right))
    elif operator == "**":
        if not isinstance(right, (int, float)) or abs(right) > _MAX_EXPONENT:
            _refuse(f"exponents over {_MAX_EXPONENT} are not allowed")
        _check_bits(left.bit_length() * right if isinstance(left, int) else 0)
    elif isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    else:
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
                _spend(_size(sequence) * max(0, times))


def _check_bits(num_bits: float) -> None:
    if num_bits > _MAX_INT_BITS:
        _refuse(f"numbers of over {_MAX_INT_BITS:,} bits are not allowed")


def _check_widths(pattern: str, values: Any) -> None:
    """Bound the result of `pattern % values`: its own widths, and the texts that it repeats."""
    if re.search(r"%[^%a-zA-Z]*\*", pattern):
        _refuse("a width that is itself an argument is not allowed")
    if isinstance(values, Mapping):
        values = list(values.values())
    parts = values if isinstance(values, (tuple, list)) else [values]
    widths = [digits for pair in _PERCENT_WIDTHS.findall(pattern) for digits in pair]
    _spend(len(pattern) + _sum(widths) + pattern.count("%") * max([*map(_size, parts), 0]))


def _check_braces(pattern: str, values: Sequence[Any]) -> None:
    """The same for `pattern.format(values)`, where a number among the values may be a width."""
    from jinja2 import Undefined

    for value in values:
        # A pattern reaches into any other object, whatever it holds.
        if not isinstance(value, (str, int, float, list, tuple, dict, Undefined, type(None))):
            _refuse(f"a {type(value).__name__} cannot be formatted")
    if re.search(r":[^}]*\{", pattern):
        check_length(max((abs(value) for value in values if isinstance(value, int)), default=0))
    widths = _BRACE_WIDTHS.findall("".join(re.findall(r"\{[^{}]*[:.][^{}]*", pattern)))
    _spend(len(pattern) + _sum(widths) + pattern.count("{") * max([*map(_size, values), 0]))


def _sum(numbers: Sequence[str]) -> int:
    # Over every limit from ten digits on; int() refuses very long numbers.
    return sum(int(digits) if len(digits) < 10 else 10**10 for digits in numbers if digits)


def checked_arguments(
    function: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a call, bounded by what the methods of strings can make of them."""
    check_time()
    # The sandbox wraps str.format, so that its method is one step further.
    function = getattr(function, "__wrapped__", function)
    text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(text, str):
        return arguments
    if name in _WIDTH_METHODS:
        times = text.count("\t") if name == "expandtabs" else 1
        for width in (*arguments, *options.values()):
            if isinstance(width, int):
                check_length(len(text) + width * times)
    elif name == "join" and len(arguments) == 1:
        arguments = (list(arguments[0]),)
        _check_joined(arguments[0], text)
    elif name == "format":
        _check_braces(text, [*arguments, *options.values()])
    elif name == "format_map" and len(arguments) == 1:
        _check_braces(text, list(dict(arguments[0]).values()))
    elif name == "replace" and len(arguments) >= 2:
        _check_replaced(text, *arguments[:2])
    return arguments


def _check_replaced(text: Any, old: Any, new: Any) -> None:
    text = str(fitting(text))
    check_length(len(text) + text.count(str(fitting(old))) * _size(new))


def _check_joined(values: Sequence[Any], separator: str) -> None:
    check_length(_size(values) + len(separator) * len(values))


def bounded_filters(filters: Mapping[str, Any]) -> dict[str, Any]:
    """Jinja's own filters, each bounded in time and size."""
    bounds = {
        "format": lambda _: _format,
        "indent": _bounded_indent,
        "join": _bounded_join,
        "replace": _bounded_replace,
        "sum": _bounded_sum,
    }
    bounds |= dict.fromkeys(("center", "truncate", "round", "batch", "slice"), _bounded_numbers)
    return {
        name: _result_spent(bounds[name](function) if name in bounds else function)
        for name, function in filters.items()
        if name not in REFUSED_FILTERS
    }


def timed_calls(functions: Mapping[str, Any]) -> dict[str, Any]:
    """The functions, each checking the time before it starts."""

    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*arguments: Any, **options: Any) -> Any:
            check_time()
            return function(*arguments, **options)

        return guarded

    return {name: guard(function) for name, function in functions.items()}


# In all wrappers below `functools.wraps` keeps jinja's mark of the first argument.


def _result_spent(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        check_time()
        return spent(function(*arguments, **options))

    return checked


def _bounded_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        for value in (*arguments, *options.values()):
            if isinstance(value, int):
                check_length(value)
        return function(*arguments, **options)

    return checked


def _bounded_indent(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def indent(text: Any, width: Any = 4, *arguments: Any, **options: Any) -> Any:
        step = width if isinstance(width, int) else len(width)
        text = str(fitting(text))
        check_length(len(text) + step * (len(text.splitlines()) + 1))
        return function(text, width, *arguments, **options)

    return indent


def _bounded_replace(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def replace(context: Any, text: Any, old: Any, new: Any, count: int | None = None) -> Any:
        _check_replaced(text, old, new)
        return function(context, text, old, new, count)

    return replace


def _bounded_join(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def join(context: Any, values: Any, d: Any = "", attribute: Any = None) -> Any:
        values = list(values)
        _check_joined(values, str(fitting(d)))
        return function(context, values, d, attribute)

    return join


def _bounded_sum(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def sum_(environment: Any, values: Any, attribute: Any = None, start: Any = 0) -> Any:
        if not isinstance(start, (int, float)):
            _refuse("a sum of anything but numbers is not allowed")
        return function(environment, values, attribute, start)

    return sum_


def _format(value: Any, *arguments: Any, **options: Any) -> str:
    """Jinja's filter `format`."""
    pattern = str(fitting(value))
    _check_widths(pattern, options or arguments)
    return str(pattern % (options or arguments))
