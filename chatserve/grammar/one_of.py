"""Where a schema says `oneOf`: the compiler names the keyword and not its place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_PLACES = 3
_SCHEMA = re.compile(r"^(?:arguments?_(\d+)\S*|json): .*?%json (?=\{)", re.MULTILINE)
# whose values are no schemas, whatever they look like
_VALUES = frozenset({"const", "default", "enum", "example", "examples"})


def places_of_one_of(kind: str, source: str) -> str:
    """Some of them, separated by commas, within the spec; empty if there are none to be found."""
    found: list[str] = []
    for name, schema in _schemas(kind, source):
        found += [f"{name}{place}".removeprefix(".") for place in _places(schema, "")]
    more = ["..."] if len(found) > MAX_PLACES else []
    return ", ".join(found[:MAX_PLACES] + more)


def _schemas(kind: str, source: str) -> Iterator[tuple[str, Any]]:
    """Each schema of a spec, with its name where there are several."""
    if kind == "json_schema":
        yield "", json.loads(source)
    elif kind == "tools":
        for match in _SCHEMA.finditer(source):
            schema, _ = json.JSONDecoder().raw_decode(source, match.end())
            name = f"tools[{match[1]}].function.parameters" if match[1] else "response_format"
            yield name, schema


def _places(schema: Any, place: str) -> Iterator[str]:
    if isinstance(schema, list):
        for i, each in enumerate(schema):
            yield from _places(each, f"{place}[{i}]")
    elif isinstance(schema, dict):
        for key, each in schema.items():
            if key == "oneOf" and isinstance(each, list):
                yield f"{place}.oneOf"
            if key not in _VALUES:
                yield from _places(each, f"{place}.{key[:64]}")
