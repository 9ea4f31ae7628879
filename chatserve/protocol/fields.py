"""What every request body is read with: JSON, limits, unknown fields, no-ops, labels.

Knows no field of any route. Nothing is dropped in silence: an unknown field is refused, and one
that chatserve does not implement is accepted only with a value that changes nothing.
"""

from __future__ import annotations

import json
import math
from codecs import BOM_UTF8
from collections.abc import Mapping, Set
from typing import Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.protocol.leniency import ignored_fields

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_NESTING = 64
INT64 = 2**63
Priority = Literal["interactive", "batch"]
"""Whether somebody sits there and waits for the answer."""

# of a token; larger ones no vocabulary has, and JSON's readers may make floats of them
ID_SCHEMA: Mapping[str, Any] = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
NOTHING: tuple[Any, ...] = (None, [], {})
# they label a request and never change its answer
LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "store"})
_LABEL_KINDS = {"metadata": (dict, "an object"), "store": (bool, "true or false")}
_LABEL_TYPES = {"metadata": "object", "store": "boolean"}


def model_of(body: bytes, default: str | None = None) -> str:
    """The model a request asks for; nothing else of it is looked at."""
    model = read_object(body).get("model")
    if model is None:
        model = default
    if not isinstance(model, str):
        raise InvalidRequest("model is missing or not a text", param="model")
    return model


def reward_of(body: bytes) -> str | None:
    """The reward model that is to rank a request's answers, if that is what it asks for; nothing
    else of it is looked at."""
    if b"rank_by" not in body:
        return None
    name = read_object(body).get("rank_by")
    return name if isinstance(name, str) else None


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is. Raises `InvalidRequest` for any other."""
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        hint = "; it begins with a byte order mark: leave that out" if body[:3] == BOM_UTF8 else ""
        raise InvalidRequest(f"the body is not valid JSON: {error}{hint}") from error
    if not isinstance(payload, dict):
        raise InvalidRequest("the body must be a JSON object")
    # brackets bound the depth from above, and spare nearly every request the walk
    if body.count(b"[") + body.count(b"{") > MAX_NESTING and _is_too_deep(payload):
        raise InvalidRequest(f"the body is nested deeper than {MAX_NESTING} levels")
    return payload


def _is_too_deep(payload: dict[str, Any]) -> bool:
    level: list[Any] = [payload]
    for _ in range(MAX_NESTING):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


Request = TypeVar("Request", bound=BaseModel)


def validate(
    kind: type[Request],
    payload: dict[str, Any],
    no_ops: Mapping[str, tuple[Any, ...]],
    *,
    labels: Set[str] = LABELS,
) -> Request:
    """`payload` as a `kind`, less no-ops and labels; raises naming the first field at fault."""
    fields = without_no_ops(payload, no_ops)
    for label in labels & fields.keys():
        check_label(label, fields.pop(label))
    # one at a time: a list of a million errors is a way to run out of memory
    refuse_unknown(fields, frozenset(kind.model_fields))
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False)[0]) from error


def without_no_ops(
    payload: dict[str, Any], no_ops: Mapping[str, tuple[Any, ...]], *, prefix: str = ""
) -> dict[str, Any]:
    """`payload` less the fields of `no_ops`, refusing those whose value asks for something."""
    for name in [name for name in payload if name in no_ops]:
        value = payload[name]
        # by type too: 0 is not False
        if not any(type(value) is type(no_op) and value == no_op for no_op in no_ops[name]):
            _refuse(prefix + name, "is not supported")
    return {name: value for name, value in payload.items() if name not in no_ops}


def no_op_schemas(no_ops: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """What `without_no_ops` accepts, as JSON Schema, by name."""
    return {name: {"enum": list(values)} for name, values in no_ops.items()}


def check_label(name: str, value: Any) -> None:
    kind, shown = _LABEL_KINDS.get(name, (str, "a text"))
    if value is not None and not isinstance(value, kind):
        raise InvalidRequest(f"{name} must be {shown}", param=name)


def label_schema(name: str) -> dict[str, Any]:
    """What `check_label` accepts, as JSON Schema."""
    return {"type": [_LABEL_TYPES.get(name, "string"), "null"]}


def refuse_unknown(fields: dict[str, Any], known: frozenset[str], *, prefix: str = "") -> None:
    """Raises for the first of `fields` that is not `known`; a lenient server takes them out."""
    for name in [name for name in fields if name not in known]:
        _refuse(prefix + shown(name), "is not a known field")
        del fields[name]


def shown(name: str) -> str:
    """A client's own name for something, as a message can hold it."""
    short = name[:64]
    return short if short and short.isprintable() else json.dumps(short)


def _refuse(name: str, reason: str) -> None:
    """Returns where the server is lenient and the field may be left out."""
    ignored = ignored_fields()
    if ignored is None:
        raise UnsupportedParameter(f"{name} {reason}; leave it out", param=name)
    ignored.add(name)


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


TYPE_NAMES = {
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "model_type": "an object",
}


def invalid_request(fault: Mapping[str, Any]) -> InvalidRequest:
    """What pydantic has found wrong, for people, naming the field."""
    param = ".".join(str(part) for part in fault["loc"])
    value, kind = fault["input"], fault["type"]
    if kind == "missing":
        return InvalidRequest(f"{param} is missing", param=param)
    if kind == "extra_forbidden":
        return UnsupportedParameter(f"{param} is not a known field; leave it out", param=param)
    if kind in TYPE_NAMES:
        return InvalidRequest(f"{param} must be {TYPE_NAMES[kind]}", param=param)
    message = fault["msg"].removeprefix("Input ")
    shown = f" is {value}: it" if is_number(value) else ""
    return InvalidRequest(f"{param}{shown} {message}", param=param)
