"""docs/reference/api.md from the OpenAPI document: each route, its fields with their limits, its
answers and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from chatserve.server.error_response import STATUSES
from chatserve.server.openapi.document import SCHEMAS, document

MAX_CHOICES_SHOWN = 12


def render() -> str:
    """The whole page."""
    return "\n".join(_Page(document()).lines()) + "\n"


class _Page:
    def __init__(self, openapi: dict[str, Any]) -> None:
        self._openapi = openapi

    def lines(self) -> Iterator[str]:
        yield "# The API\n"
        yield (
            "Made by `make docs` from the OpenAPI document that every server has at "
            "`/openapi.json`; do not edit.\n"
        )
        yield self._openapi["info"]["description"] + "\n"
        operations = [
            (method, path, operation)
            for path, methods in self._openapi["paths"].items()
            for method, operation in methods.items()
        ]
        for tag in self._openapi["tags"]:
            yield f"## {tag['name']}\n"
            for method, path, operation in operations:
                if tag["name"] in operation["tags"]:
                    yield from self._operation(method, path, operation)
        yield from self._errors()

    def _operation(self, method: str, path: str, operation: Any) -> Iterator[str]:
        yield f"### {method.upper()} {path}\n"
        about = operation.get("description", "")
        yield f"{operation['summary']}. {about}".strip() + "\n"
        if operation["security"] == [{"key": []}]:
            yield "Open to nobody without a key, also where the server has none for other routes.\n"
        if "requestBody" in operation:
            [content] = operation["requestBody"]["content"].values()
            yield f"```json\n{json.dumps(content['example'])}\n```\n"
            yield from self._fields(self._resolve(content["schema"]))
        yield from self._replies(operation["responses"])

    def _fields(self, schema: Mapping[str, Any]) -> Iterator[str]:
        yield "| field | value | meaning |\n|---|---|---|"
        required = schema.get("required", ())
        for name, field in schema["properties"].items():
            star = ", required" if name in required else ""
            value = self._value(field).replace("|", "\\|")
            yield f"| `{name}`{star} | {value} | {field.get('description', '')} |"
        yield ""

    def _replies(self, responses: Mapping[str, Any]) -> Iterator[str]:
        seen: list[str] = []
        for status, response in responses.items():
            for kind, content in response["content"].items():
                shape = self._shape(content["schema"])
                if int(status) >= 400 and kind == "application/json" and '"error"' in shape:
                    continue
                if shape in seen:
                    continue
                seen.append(shape)
                title = "Each event of a stream" if kind == "text/event-stream" else status
                yield f"{title}:\n\n```text\n{shape}\n```\n"
        codes = [status for status in responses if int(status) >= 400]
        yield f"Errors: {', '.join(codes)}.\n"

    def _errors(self) -> Iterator[str]:
        yield "## Errors\n"
        yield (
            "Before the first byte of an answer an error is a status, after it the last event of "
            "the stream, which then ends without `[DONE]`.\n"
        )
        yield "| status | code | type | when |\n|---|---|---|---|"
        for kind, (status, error_type) in sorted(STATUSES.items(), key=lambda row: row[1][0]):
            meaning = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
            yield f"| {status} | `{kind.code}` | `{error_type}` | {meaning} |"

    def _resolve(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        while "$ref" in schema:
            schema = self._openapi["components"]["schemas"][schema["$ref"].removeprefix(SCHEMAS)]
        return schema

    def _value(self, schema: Mapping[str, Any]) -> str:
        """A schema in a few words."""
        schema = self._resolve(schema)
        if "anyOf" in schema or "oneOf" in schema:
            parts = [self._value(each) for each in schema.get("anyOf", schema.get("oneOf"))]
            return " or ".join(dict.fromkeys(parts))
        if "const" in schema:
            return f"`{json.dumps(schema['const'])}`"
        if "enum" in schema:
            shown = [f"`{json.dumps(each)}`" for each in schema["enum"]]
            more = ", …" if len(shown) > MAX_CHOICES_SHOWN else ""
            return ", ".join(shown[:MAX_CHOICES_SHOWN]) + more
        kind = schema.get("type", "anything")
        if isinstance(kind, list):
            return " or ".join(self._value({**schema, "type": each}) for each in kind)
        if kind == "array":
            return f"list{_span(schema, 'minItems', 'maxItems')} of {self._value(schema['items'])}"
        if kind == "object":
            names = [
                f"`{name}`{_only(each)}" for name, each in schema.get("properties", {}).items()
            ]
            return f"object of {', '.join(names)}" if names else "object"
        name = {"string": "text", "boolean": "true or false"}.get(kind, kind)
        if kind == "string":
            return str(name) + _span(schema, "minLength", "maxLength")
        return str(name) + _range(schema)

    def _shape(self, schema: Mapping[str, Any], indent: str = "") -> str:
        """A reply as it looks, with types for values."""
        schema = self._resolve(schema)
        if "anyOf" in schema:
            *kinds, last = schema["anyOf"]
            if kinds and last == {"type": "null"}:
                return " | ".join(self._shape(each, indent) for each in kinds) + " | null"
            return " | ".join(self._shape(each, indent) for each in schema["anyOf"])
        if schema.get("type") == "array":
            return f"[{self._shape(schema['items'], indent)}, …]"
        if "enum" in schema:
            return " | ".join(map(json.dumps, schema["enum"]))
        if "properties" not in schema:
            return {"object": "{…}"}.get(schema.get("type", ""), self._value(schema)).replace(
                "`", ""
            )
        inner = indent + "  "
        required = schema.get("required", ())
        lines = [
            f'{inner}"{name}"{"" if name in required else "?"}: {self._shape(each, inner)}'
            for name, each in schema["properties"].items()
        ]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _only(schema: Mapping[str, Any]) -> str:
    """Of a field that may be left out and has few values, most often those that change nothing."""
    values = schema.get("enum", ())
    if None not in values:
        return ""
    return f" (only {', '.join(f'`{json.dumps(each)}`' for each in values)})"


def _span(schema: Mapping[str, Any], least: str, most: str) -> str:
    if most not in schema:
        return ""
    return f" ({schema.get(least, 0)} to {schema[most]:,})"


def _range(schema: Mapping[str, Any]) -> str:
    parts = [
        f"{sign} {_number(schema[key])}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if key in schema
    ]
    return f" ({', '.join(parts)})" if parts else ""


def _number(value: float) -> str:
    return "2⁶³" if value == 2**63 else "-2⁶³" if value == -(2**63) else f"{value:,}"
