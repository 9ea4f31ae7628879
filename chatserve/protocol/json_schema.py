"""JSON Schemas that an answer can be held to: what they may say, checked keyword by keyword.

Pure functions on plain JSON. Knows no grammar engine; a keyword that is not listed here is refused
by name, because a constraint that is ignored in silence is a wrong answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from chatserve.errors import InvalidRequest, UnsupportedParameter

MAX_DEPTH = 32
MAX_SHOWN_PARAM = 200

# they describe and constrain nothing
ANNOTATIONS = frozenset({
    "$anchor", "$comment", "$id", "$schema", "contentEncoding", "contentMediaType", "default",
    "deprecated", "description", "discriminator", "example", "examples", "readOnly", "title",
    "writeOnly",
})  # fmt: skip
_CONSTRAINTS = frozenset({
    "$ref", "additionalItems", "additionalProperties", "allOf", "anyOf", "const", "enum",
    "exclusiveMaximum", "exclusiveMinimum", "format", "items", "maxItems", "maxLength",
    "maxProperties", "maximum", "minItems", "minLength", "minProperties", "minimum", "multipleOf",
    "oneOf", "pattern", "patternProperties", "prefixItems", "properties", "required", "type",
})  # fmt: skip
_NAMED = ("$defs", "definitions", "patternProperties", "properties")
_LISTED = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_SINGLE = ("additionalItems", "additionalProperties", "items")
# what comes nearest to those that are missed
_INSTEAD: Mapping[str, str] = {
    "not": "leave it out, or list what is allowed with enum or anyOf",
    "contains": "leave it out, or put what has to be there first with prefixItems",
    "uniqueItems": "leave it out and look at the answer, or use an object with a property for each",
    **dict.fromkeys(
        ("if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies"),
        "leave it out, or use anyOf of objects that tell themselves apart by a const",
    ),
}
KEYWORDS = ANNOTATIONS | _CONSTRAINTS | frozenset(_NAMED)
FORMATS = frozenset({
    "date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid",
})  # fmt: skip

# JSON spells them with \u, which an answer must not use: see `chatserve.grammar.source`
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_CONTROL_ESCAPE = re.compile(r"(?<!\\)(\\\\)*\\([0Uacv]|x[01{]|x7[fF]|u00[01]|u007[fF]|u\{)")

_YEAR = r"([1-9]\d{3}|0[1-9]\d\d|00[1-9]\d|000[1-9])"
_LEAP_YEAR = r"(\d\d(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DAY = (
    r"((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)"
    r"|02-(0[1-9]|1\d|2[0-8]))"
)
_DATE = rf"({_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,9})?([Zz]|[+-]([01]\d|2[0-3]):[0-5]\d)"
# the engine's own forms of these let through days that no calendar has
_EXACT_FORMATS: Mapping[str, str] = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}[Tt]{_TIME}$",
}


def check_schema(schema: Any, param: str) -> dict[str, Any]:
    """`schema` if an answer can be held to every word of it, with days as the calendar has them.

    Raises `UnsupportedParameter` naming the keyword that cannot be kept, `InvalidRequest` for what
    is no schema.
    """
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{param} must be a JSON Schema, an object", param=param)
    checked: dict[str, Any] = _checked(schema, param, 0)
    return checked


def _checked(schema: Any, param: str, depth: int) -> Any:
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise _at(InvalidRequest, param, "must be a JSON Schema: an object, true or false")
    if depth > MAX_DEPTH:
        raise _at(InvalidRequest, param, f"lies deeper than {MAX_DEPTH} levels; use $defs and $ref")
    for keyword in schema:
        _check_keyword(keyword, schema[keyword], f"{param}.{keyword[:64]}")
    copy = dict(schema)
    for keyword, children in _children(schema, param):
        copy[keyword] = (
            [_checked(child, name, depth + 1) for _, name, child in children]
            if isinstance(schema[keyword], list)
            else {key: _checked(child, name, depth + 1) for key, name, child in children}
        )
    for keyword in _SINGLE:
        if keyword in schema and not isinstance(schema[keyword], list):
            copy[keyword] = _checked(schema[keyword], f"{param}.{keyword}", depth + 1)
    exact = _EXACT_FORMATS.get(schema.get("format", ""))
    if exact is not None:
        copy["allOf"] = [*copy.get("allOf", []), {"pattern": exact}]
    return copy


def _children(
    schema: dict[str, Any], param: str
) -> Iterator[tuple[str, list[tuple[str, str, Any]]]]:
    """Schemas inside of `schema`: by keyword, with their key and their name in the request."""
    for keyword in _NAMED:
        if keyword in schema:
            if not isinstance(schema[keyword], dict):
                raise _at(InvalidRequest, f"{param}.{keyword}", "must be an object")
            names = schema[keyword].items()
            yield keyword, [(key, f"{param}.{keyword}.{key[:64]}", each) for key, each in names]
    for keyword in _LISTED:
        if isinstance(schema.get(keyword), list):
            each = enumerate(schema[keyword])
            yield keyword, [("", f"{param}.{keyword}[{i}]", child) for i, child in each]
        elif keyword in schema and keyword not in _SINGLE:
            raise _at(InvalidRequest, f"{param}.{keyword}", "must be a list")


def _check_keyword(keyword: str, value: Any, param: str) -> None:
    if keyword.startswith("x-") and keyword != "x-guidance":
        return
    if keyword not in KEYWORDS:
        raise _at(
            UnsupportedParameter, param,
            "is not a keyword that an answer can be held to; "
            + _INSTEAD.get(keyword, "leave it out"),
        )  # fmt: skip
    if keyword == "format" and (not isinstance(value, str) or value not in FORMATS):
        raise _at(
            UnsupportedParameter, param,
            f"{str(value)[:40]!r} is not supported; use one of {', '.join(sorted(FORMATS))}, "
            "or a pattern",
        )  # fmt: skip
    if keyword in ("const", "enum") and any(map(_CONTROL.search, _texts(value))):
        raise _control(param)
    if keyword == "pattern" and isinstance(value, str) and _has_control(value):
        raise _control(param)
    if keyword == "patternProperties" and isinstance(value, dict) and any(map(_has_control, value)):
        raise _control(param)
    if keyword == "$ref" and not (isinstance(value, str) and value.startswith("#")):
        raise _at(
            UnsupportedParameter, param,
            "must point into the schema itself (#/$defs/...); nothing is fetched",
        )  # fmt: skip


def _has_control(pattern: str) -> bool:
    return bool(_CONTROL.search(pattern) or _CONTROL_ESCAPE.search(pattern))


def _texts(value: Any) -> Iterator[str]:
    """All texts in `value`, names too."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict):
            waiting += [*each, *each.values()]
        elif isinstance(each, list):
            waiting += each


def _control(param: str) -> InvalidRequest:
    return _at(
        UnsupportedParameter, param, "holds a control character that JSON has no short escape for"
    )


def _at(kind: type[InvalidRequest], param: str, message: str) -> InvalidRequest:
    # a path is made of the schema's own names, which may be long
    shown = param if len(param) <= MAX_SHOWN_PARAM else f"{param[:MAX_SHOWN_PARAM]}..."
    return kind(f"{shown} {message}", param=shown)
