"""The OpenAPI document: valid, complete, and true of what the servers say and refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from chatserve.protocol.adapters import LOAD_PATH, UNLOAD_PATH
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import CONTROL_PREFIX, Edge
from chatserve.server.error_response import OF_THE_PAGE, STATUSES
from chatserve.server.openapi.document import OPERATIONS, PATH, document
from chatserve.server.openapi.notes import NOTES
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_worker_app
from tests.asgi import RunningApp, running
from tests.fakes import FakeClock, FakeEngine, FakeModel

DOCUMENT = document()
BODIES = [each for each in OPERATIONS if each.body is not None]


def worker() -> Edge:
    return create_worker_app(FakeEngine(num_cached=2), FakeModel(), control_token="token")


def controller() -> Edge:
    return create_controller_app(WorkerRegistry(FakeClock()), control_token="token")


@pytest.fixture(scope="module")
def api() -> Iterator[RunningApp]:
    with running(worker()) as api:
        yield api


def schema_of(reference: dict[str, Any]) -> dict[str, Any]:
    name = reference["$ref"].rpartition("/")[2]
    schema: dict[str, Any] = DOCUMENT["components"]["schemas"][name]
    return schema


def body_schema(path: str) -> dict[str, Any]:
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]
    return schema_of(content["application/json"]["schema"])


def validator(schema: dict[str, Any], *, is_closed: bool = False) -> Draft202012Validator:
    """`is_closed`: properties that the document does not name are errors, too."""
    whole = {**schema, "components": DOCUMENT["components"]}
    return Draft202012Validator(closed(whole) if is_closed else whole)


def closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(each) for name, each in schema.items()}
    return {"additionalProperties": False, **inner} if "properties" in schema else inner


def test_it_is_valid() -> None:
    validate(DOCUMENT)


def lone_worker() -> Edge:
    return create_worker_app(FakeEngine(), FakeModel())


@pytest.mark.parametrize("build", [lone_worker, controller])
def test_every_route_is_described(build: Any) -> None:
    app: Any = build().app
    routes = {
        (method.lower(), route.path.replace(":path}", "}"))
        for route in app.routes
        if isinstance(route, APIRoute) and not route.path.startswith(CONTROL_PREFIX)
        for method in route.methods
    }
    hidden = {("post", path) for path in HIDDEN}
    assert routes - hidden == {(each.method, each.path) for each in OPERATIONS}


HIDDEN = ("/v1/stage_lora_adapter", "/v1/settle_lora_adapter")
"""What a controller alone asks of its workers."""


@pytest.mark.parametrize("build", [worker, controller])
def test_it_is_served(build: Any) -> None:
    with running(build()) as api:
        assert json.loads(api.request("GET", PATH).body) == json.loads(json.dumps(DOCUMENT))


def test_every_field_says_what_it_means() -> None:
    used = set()
    for operation in BODIES:
        assert operation.body is not None
        for name in body_schema(operation.path)["properties"].keys() - operation.body.no_ops.keys():
            qualified = f"{operation.body.kind.__name__}.{name}"
            used.add(qualified if qualified in NOTES else name)
    assert used == set(NOTES)


def test_every_error_is_listed() -> None:
    listed = {
        code.strip("` ")
        for path in DOCUMENT["paths"].values()
        for operation in path.values()
        for response in operation["responses"].values()
        for code in response["description"].split(",")
    }
    # the router's, and the page's own
    missing = {kind.code for kind in STATUSES} - listed
    assert missing == {"method_not_allowed", *(kind.code for kind in OF_THE_PAGE)}


def test_names_are_distinct() -> None:
    names = [each.name for each in OPERATIONS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("operation", BODIES, ids=lambda each: each.path)
def test_examples_are_valid(operation: Any) -> None:
    validator(body_schema(operation.path)).validate(dict(operation.body.example))


CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "fake", "prompt": ["hi", "ho"]}
USAGE = {"stream_options": {"include_usage": True}}
ITEMS = {"model": "fake", "input": [{"role": "user", "content": "hi"}]}
TURNS = CHAT | {"max_tokens": 100, "system": "be brief"}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"n": 2, "max_tokens": 1}),
        ("/v1/completions", TEXT),
        ("/v1/responses", ITEMS),
        ("/v1/responses", ITEMS | {"max_output_tokens": 2, "truncation": "auto"}),
        ("/v1/messages", TURNS),
        ("/v1/messages", TURNS | {"max_tokens": 2}),
        ("/v1/messages/count_tokens", CHAT),
    ],
)
def test_whole_answers_are_as_described(api: RunningApp, path: str, fields: Any) -> None:
    reply = DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]
    answer = api.post(path, fields)
    assert answer.status == 200
    schema = reply["application/json"]["schema"]
    validator(schema, is_closed=True).validate(json.loads(answer.body))


@pytest.mark.parametrize(
    ("path", "fields"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)]
)
@pytest.mark.parametrize("options", [{}, USAGE])
def test_events_are_as_described(api: RunningApp, path: str, fields: Any, options: Any) -> None:
    reply = DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]
    answer = api.post(path, {**fields, "stream": True, **options})
    *events, done = answer.body.decode().removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]" and len(events) > 3
    checker = validator(reply["text/event-stream"]["schema"], is_closed=True)
    for event in events:
        checker.validate(json.loads(event.removeprefix("data: ")))


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/responses", ITEMS),
        ("/v1/responses", ITEMS | {"max_output_tokens": 2}),
        ("/v1/messages", TURNS),
    ],
)
def test_named_events_are_as_described(api: RunningApp, path: str, fields: Any) -> None:
    reply = DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]
    answer = api.post(path, {**fields, "stream": True})
    events = answer.body.decode().removesuffix("\n\n").split("\n\n")
    assert len(events) > 6
    checker = validator(reply["text/event-stream"]["schema"], is_closed=True)
    for event in events:
        name, data = event.split("\n")
        said = json.loads(data.removeprefix("data: "))
        assert said["type"] == name.removeprefix("event: ")
        checker.validate(said)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/v1/messages/no"])
def test_errors_of_messages_have_their_own_shape(api: RunningApp, path: str) -> None:
    schema = {"$ref": "#/components/schemas/MessageError"}
    answer = api.post(path, {})
    assert answer.status in (400, 404)
    validator(schema, is_closed=True).validate(json.loads(answer.body))


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/v1/models/fake", "/health/live", "/health/ready", "/health/decode"],
)
def test_facts_are_as_described(api: RunningApp, path: str) -> None:
    item = DOCUMENT["paths"][path.replace("models/fake", "models/{name}")]["get"]
    schema = item["responses"]["200"]["content"]["application/json"]["schema"]
    answer = api.request("GET", path)
    assert answer.status == 200
    validator(schema, is_closed=True).validate(json.loads(answer.body))


@pytest.mark.parametrize(
    ("path", "payload"),
    [
        ("/v1/chat/completions", {}),
        ("/v1/completions", {"model": "other", "prompt": "x"}),
        ("/v1/nope", {}),
    ],
)
def test_errors_are_as_described(api: RunningApp, path: str, payload: Any) -> None:
    answer = api.post(path, payload)
    assert answer.status in (400, 404)
    schema = {"$ref": "#/components/schemas/ErrorReply"}
    validator(schema, is_closed=True).validate(json.loads(answer.body))


@pytest.mark.parametrize("path", [LOAD_PATH, UNLOAD_PATH])
def test_adapters_need_a_key(api: RunningApp, path: str) -> None:
    assert DOCUMENT["paths"][path]["post"]["security"] == [{"key": []}]
    assert api.post(path, {}).status == 401
