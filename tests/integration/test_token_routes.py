"""/tokenize and /detokenize over real sockets: by a worker alone, and through a controller."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_worker_app
from tests.fakes import FakeAdapters, FakeEngine, FakeModel
from tests.servers import serving

TOKEN = "control-token"
MESSAGES = [{"role": "user", "content": "hi"}]
IDS = [*b"<user>hi", 1]

Post = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[str, str]]:
    """Of a worker of one model with an adapter, and of the controller in front of it."""
    registry = WorkerRegistry(time.monotonic)
    names = ["fake", "fake:hat"]
    cards = [
        ModelCard(name=names[0], created=1),
        ModelCard(name=names[1], created=1, parent="fake"),
    ]
    with ExitStack() as stack:
        model = FakeModel(adapters=FakeAdapters("hat"))
        policy = AccessPolicy.build("127.0.0.1", api_keys=[TOKEN])
        worker = stack.enter_context(
            serving(lambda: create_worker_app(FakeEngine(), model, policy=policy))
        )
        controller = stack.enter_context(
            serving(lambda: create_controller_app(registry, control_token=TOKEN))
        )
        registry.register("w", worker.url, WorkerStatus(state="ready", models=cards))
        yield {"worker": worker.url, "controller": controller.url}


@pytest.fixture(params=["worker", "controller"])
def post(urls: dict[str, str], request: pytest.FixtureRequest) -> Post:
    def send(path: str, **fields: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.post(urls[request.param] + path, json=fields, headers=headers)

    return send


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": "fake"}, {"model": "fake:hat"}])
def test_the_model_may_be_left_out_where_there_is_one(post: Post, model: dict[str, Any]) -> None:
    reply = post("/tokenize", prompt="hi", **model)
    assert reply.status_code == 200
    assert reply.json() == {
        "count": 3, "max_model_len": 1000, "tokens": [0, 104, 105], "token_strs": None,
    }  # fmt: skip


def test_text(post: Post) -> None:
    reply = post("/tokenize", prompt="hi", add_special_tokens=False, return_token_strs=True).json()
    assert (reply["tokens"], reply["token_strs"]) == ([104, 105], ["h", "i"])


def test_chat(post: Post) -> None:
    assert post("/tokenize", messages=MESSAGES).json()["tokens"] == IDS
    said = post("/tokenize", messages=MESSAGES, add_generation_prompt=False).json()
    assert (said["tokens"], said["count"]) == (IDS[:-1], 8)


def test_chat_with_tools(post: Post) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    chat = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "4 degrees"},
    ]
    ids = post("/tokenize", messages=chat, tools=tools).json()["tokens"]
    assert ids == [*b"<f><user>hi<assistant><tool>4 degrees", 1]


def test_back_to_text(post: Post) -> None:
    assert post("/detokenize", model="fake", tokens=[0, 104]).json() == {"prompt": "\0h"}
    skipped = post("/detokenize", tokens=[0, 104], skip_special_tokens=True)
    assert skipped.json() == {"prompt": "h"}


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        ("/tokenize", {"model": "other", "prompt": "a"}, 404, "model"),
        ("/detokenize", {"model": "fake:none", "tokens": []}, 404, "model"),
        ("/tokenize", {"prompt": "a", "colour": "red"}, 400, "colour"),
        ("/detokenize", {"tokens": [-1.5]}, 400, "tokens"),
    ],
)
def test_refused(post: Post, path: str, fields: dict[str, Any], status: int, param: str) -> None:
    reply = post(path, **fields)
    assert reply.status_code == status
    # a controller knows models only, not where their name stood
    assert reply.json()["error"]["param"] in (param, None if status == 404 else param)


def test_several_models_must_be_named() -> None:
    registry = WorkerRegistry(time.monotonic)
    cards = [ModelCard(name=name, created=1) for name in ("a", "b")]
    registry.register("w", "http://127.0.0.1:9", WorkerStatus(state="ready", models=cards))
    with serving(lambda: create_controller_app(registry, control_token=TOKEN)) as controller:
        reply = httpx.post(f"{controller.url}/tokenize", json={"prompt": "a"})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "model"


def test_keys_are_asked_for(urls: dict[str, str]) -> None:
    assert httpx.post(urls["worker"] + "/tokenize", json={"prompt": "a"}).status_code == 401
