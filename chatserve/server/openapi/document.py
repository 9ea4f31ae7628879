"""The pieces put together: an OpenAPI 3.1 document of everything that clients may call.

The same on worker and controller. Left out is what only controllers and workers say to each other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode
from starlette.responses import Response

import chatserve
from chatserve.protocol.fields import MAX_BODY_BYTES, MAX_NESTING, label_schema, no_op_schemas
from chatserve.protocol.leniency import HEADER
from chatserve.server.error_response import OF_THE_PAGE, STATUSES
from chatserve.server.json_response import JSON_TYPE
from chatserve.server.openapi import (
    completions,
    embeddings,
    messages,
    models,
    operator,
    responses,
    tokens,
)
from chatserve.server.openapi.notes import NO_OP, NOTES
from chatserve.server.openapi.operation import Body, Operation
from chatserve.server.request_id import HEADER as REQUEST_ID_HEADER
from chatserve.server.request_id import MAX_LEN as MAX_REQUEST_ID_LEN

PATH = "/openapi.json"
OPERATIONS: tuple[Operation, ...] = (
    *completions.OPERATIONS,
    *responses.OPERATIONS,
    *messages.OPERATIONS,
    *embeddings.OPERATIONS,
    *tokens.OPERATIONS,
    *models.OPERATIONS,
    *operator.OPERATIONS,
)
SCHEMAS = "#/components/schemas/"
ABOUT = f"""\
A local server of language models that speaks the OpenAI API, and Anthropic's Messages.

Bodies are JSON in UTF-8, up to {MAX_BODY_BYTES:,} bytes and {MAX_NESTING} levels deep. Nothing is
dropped in silence: an unknown field is refused by name, or, by a server started with `--lenient`,
listed in the header `{HEADER}` of the answer. A field that is null is as good as left out, where
null is allowed. A server with API keys wants one as `Authorization: Bearer KEY`, or as
`x-api-key: KEY`. Every answer has a `{REQUEST_ID_HEADER}`: the request's own, if that is one word
of visible ASCII of up to {MAX_REQUEST_ID_LEN} characters, else a new one."""
REQUEST_ID = {
    "description": "the request's own, or a new one; the server's log has it, too",
    "schema": {"type": "string", "maxLength": MAX_REQUEST_ID_LEN},
}
RETRY_AFTER = {"description": "seconds to wait", "schema": {"type": "integer", "minimum": 1}}
IGNORED = {
    "description": "fields that a lenient server has left out, with commas between them",
    "schema": {"type": "string"},
}


class _Generator(GenerateJsonSchema):
    """Without a title for each field, which only repeats its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def document(operations: Sequence[Operation] = OPERATIONS) -> dict[str, Any]:
    """The whole document, as JSON is in Python."""
    schemas = _Schemas(operations)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "chatserve",
            "version": chatserve.__version__,
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(each.tag for each in operations)],
        "paths": paths,
        "components": {
            "schemas": schemas.definitions,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


@functools.cache
def encoded() -> bytes:
    return orjson.dumps(document())


def add_to(app: FastAPI) -> None:
    """Serve the document; there is no page around it."""

    async def openapi() -> Response:
        return Response(encoded(), media_type=JSON_TYPE)

    app.add_api_route(PATH, openapi)


class _Schemas:
    """The schemas of all types that operations name, each under its own name."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        kinds = list(dict.fromkeys(kind for each in operations for kind in _kinds(each)))
        mode: JsonSchemaMode = "validation"
        self._refs, described = TypeAdapter.json_schemas(
            [(kind, mode, TypeAdapter(kind)) for kind in kinds],
            ref_template=SCHEMAS + "{model}",
            schema_generator=_Generator,
        )
        self.definitions: dict[str, Any] = described["$defs"]
        for body in dict.fromkeys(each.body for each in operations if each.body is not None):
            self._complete(body)

    def ref(self, kind: Any) -> dict[str, Any]:
        return dict(self._refs[kind, "validation"])

    def of(self, kind: Any) -> dict[str, Any]:
        """The schema itself, behind the reference."""
        found: dict[str, Any] = self.definitions[self.ref(kind)["$ref"].removeprefix(SCHEMAS)]
        return found

    def _complete(self, body: Body) -> None:
        """Add what is checked before the model sees a body, and what the fields mean."""
        properties = self.of(body.kind)["properties"]
        properties |= no_op_schemas(body.no_ops)
        properties |= {label: label_schema(label) for label in sorted(body.labels)}
        for name, schema in properties.items():
            if "default" in schema and schema["default"] in (None, [], {}):
                del schema["default"]
            of_request = NOTES.get(f"{body.kind.__name__}.{name}")
            note = NO_OP if name in body.no_ops else of_request or NOTES.get(name)
            if note is not None:
                schema.setdefault("description", note)


def _kinds(operation: Operation) -> Iterator[Any]:
    yield operation.reply
    yield operation.error
    yield from operation.also.values()
    if operation.event is not None:
        yield operation.event
    if operation.body is not None:
        yield operation.body.kind


def _operation(operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": _responses(operation, schemas),
        "security": {"usual": [{"key": []}, {}], "open": [], "keyed": [{"key": []}]}[
            operation.access
        ],
    }
    if operation.about:
        described["description"] = operation.about
    if operation.parameters:
        described["parameters"] = [
            {
                "name": name, "in": "path", "required": True, "description": about,
                "schema": {"type": "string", "minLength": 1},
            }
            for name, about in operation.parameters.items()
        ]  # fmt: skip
    if operation.query:
        described.setdefault("parameters", []).extend(
            {"name": name, "in": "query", "schema": schema}
            for name, schema in operation.query.items()
        )
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {
                JSON_TYPE: {
                    "schema": schemas.ref(operation.body.kind),
                    "example": dict(operation.body.example),
                }
            },
        }
    return described


def _responses(operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    content = {operation.media: {"schema": schemas.ref(operation.reply)}}
    if operation.event is not None:
        # of each event; OpenAPI 3.1 has no word for a stream of them
        content["text/event-stream"] = {"schema": schemas.ref(operation.event)}
    done: dict[str, Any] = {"description": operation.summary, "content": content}
    if operation.body is not None:
        done["headers"] = {HEADER: IGNORED}
    replies: dict[int, dict[str, Any]] = {200: done}
    for status, kind in operation.also.items():
        content = {JSON_TYPE: {"schema": schemas.ref(kind)}}
        replies[status] = {"description": HTTPStatus(status).phrase, "content": content}
    for status in operation.errors:
        replies[status] = {
            "description": error_codes(status),
            "content": {JSON_TYPE: {"schema": schemas.ref(operation.error)}},
        }
        if status in (429, 503):
            replies[status]["headers"] = {"Retry-After": RETRY_AFTER}
    for reply in replies.values():
        reply["headers"] = {REQUEST_ID_HEADER: REQUEST_ID, **reply.get("headers", {})}
    return {str(status): replies[status] for status in sorted(replies)}


def error_codes(status: int) -> str:
    """The codes of a status, as a list in words."""
    codes = [
        kind.code
        for kind, (row, _) in STATUSES.items()
        if row == status and kind not in OF_THE_PAGE
    ]
    return ", ".join(f"`{code}`" for code in codes)
