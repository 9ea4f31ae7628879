"""Arguments that a model writes one by one, each between tags, and what each of them may be.

What a schema says is text only is written as it is; everything else is JSON between its tags. Both
the grammar of an answer and its reader go by this, so that neither has to guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from chatserve.errors import UnsupportedParameter
from chatserve.models.tool_format import ToolFormat
from chatserve.protocol.json_schema import ANNOTATIONS
from chatserve.protocol.tools import Tool

Kind = Literal["text", "text or null", "json"]
Kinds = Mapping[str, Mapping[str, Kind]]
"""Of the arguments of each tool."""
NULL: Final = "null"
PARAM: Final = "tools[{}].function.parameters"
MAX_REFERENCES: Final = 32
"""From one schema to the next, until one says something."""
_DEFINITIONS = ("$defs", "definitions")
# of an object: what tags can say
_OBJECT = frozenset({"type", "properties", "required", "additionalProperties", *_DEFINITIONS})
_TEXT_LENGTHS = frozenset({"minLength", "maxLength"})
_KEY = re.compile(r"[^<>\x00-\x1f\x7f]+")


@dataclass(frozen=True)
class Argument:
    """One argument of a tool. schema: of what JSON says, with all that it refers to.

    texts: the only ones that there are; else any of `lengths`.
    """

    name: str
    kind: Kind
    schema: Mapping[str, Any]
    is_required: bool
    texts: tuple[str, ...] = ()
    lengths: tuple[int, int | None] = (0, None)


def argument_kinds(tools: Sequence[Tool], tool_format: ToolFormat) -> Kinds:
    """Empty for a format whose arguments are JSON. Raises as `arguments_of` does."""
    if (tags := tool_format.tags) is None:
        return {}
    return {
        tool.name: {each.name: each.kind for each in arguments_of(tool, PARAM.format(i), tags.end)}
        for i, tool in enumerate(tools)
    }


def arguments_of(tool: Tool, param: str, end: str) -> Sequence[Argument]:
    """All that `tool` takes, in their order.

    `end`: what ends each, so that no text may hold it. Raises `UnsupportedParameter` naming what
    cannot be said with tags.
    """
    root = tool.schema
    for keyword in root:
        if keyword not in _OBJECT and keyword not in ANNOTATIONS and not keyword.startswith("x-"):
            raise _refusal(f"{param}.{keyword}", "cannot be kept")
    if not all(map(_is_definition, _references(root))):
        raise _refusal(
            f"{param}.$ref", "points at something else than #/$defs/..., which cannot be"
        )
    required = root.get("required", [])
    properties = root.get("properties", {})
    schemas = {**properties, **{name: True for name in required if name not in properties}}
    arguments = []
    for name, schema in schemas.items():
        here = f"{param}.properties.{name[:64]}"
        if not _KEY.fullmatch(name):
            raise _refusal(here, "has a name that cannot be written")
        if schema is not False or name in required:
            arguments.append(_argument(name, schema, root, end))
    return arguments


def _argument(name: str, schema: Any, root: Mapping[str, Any], end: str) -> Argument:
    whole, is_required = _alone(schema, root), name in root.get("required", [])
    schema = _resolved(schema, root)
    is_nullable = False
    if isinstance(schema, dict):
        schema, is_nullable = _without_null(schema, root)
    kind: Kind = "text or null" if is_nullable else "text"
    if (texts := _only_texts(schema)) is not None:
        is_plain = not any(end in text for text in texts) and not (is_nullable and NULL in texts)
        if is_plain:
            return Argument(name, kind, whole, is_required, texts=texts)
    elif (lengths := _lengths(schema)) is not None:
        return Argument(name, kind, whole, is_required, lengths=lengths)
    return Argument(name, "json", whole, is_required)


def _only_texts(schema: Any) -> tuple[str, ...] | None:
    """The texts that a schema lists, if it lists texts and says nothing else."""
    said = _said(schema)
    if said not in ({"enum"}, {"const"}) or schema.get("type", "string") != "string":
        return None
    texts = schema["enum"] if "enum" in schema else [schema["const"]]
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        return None
    return tuple(dict.fromkeys(texts))


def _lengths(schema: Any) -> tuple[int, int | None] | None:
    """How long a text may be, if a schema asks for any text and says nothing else."""
    if not isinstance(schema, dict) or schema.get("type") != "string":
        return None
    if not _said(schema) <= _TEXT_LENGTHS:
        return None
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    is_known = all(type(each) is int and each >= 0 for each in (least, most) if each is not None)
    return (least, most) if is_known and (most is None or least <= most) else None


def _said(schema: Any) -> set[str]:
    """The keywords that constrain, beside the type."""
    if not isinstance(schema, dict):
        return {"type"}
    return {
        keyword
        for keyword in schema
        if keyword not in ANNOTATIONS and keyword != "type" and not keyword.startswith("x-")
    }


def _without_null(schema: dict[str, Any], root: Mapping[str, Any]) -> tuple[Any, bool]:
    """What a schema says beside null, and whether it allows that."""
    kinds = schema.get("type")
    if isinstance(kinds, list) and sorted(map(str, kinds)) == ["null", "string"]:
        return {**schema, "type": "string"}, not _said(schema) & {"enum", "const"}
    for keyword in ("anyOf", "oneOf"):
        parts = schema.get(keyword)
        if _said(schema) == {keyword} and "type" not in schema and isinstance(parts, list):
            rest = [part for part in parts if part != {"type": "null"}]
            if len(rest) == 1 and len(parts) == 2:
                return _resolved(rest[0], root), True
    return schema, False


def _resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """Where a schema does nothing but refer to another, that one."""
    for _ in range(MAX_REFERENCES):
        if not isinstance(schema, dict) or _said(schema) != {"$ref"} or "type" in schema:
            return schema
        _, keyword, *path = str(schema["$ref"]).split("/")
        target = root.get(keyword, {}).get(path[0]) if len(path) == 1 else None
        if target is None:
            return schema
        schema = target
    return schema


def _alone(schema: Any, root: Mapping[str, Any]) -> dict[str, Any]:
    """`schema` with what it may refer to."""
    if not isinstance(schema, dict):
        return {} if schema else {"enum": []}
    return {**schema, **{each: root[each] for each in _DEFINITIONS if each in root}}


def _is_definition(reference: str) -> bool:
    return reference.startswith(tuple(f"#/{each}/" for each in _DEFINITIONS))


def _references(schema: Any) -> Iterator[str]:
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            if isinstance(each.get("$ref"), str):
                yield each["$ref"]
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


def _refusal(param: str, what: str) -> UnsupportedParameter:
    return UnsupportedParameter(
        f"{param} {what} in the form of calls that this model has learnt, which writes each "
        "argument between tags; say it another way, or leave it out",
        param=param,
    )
