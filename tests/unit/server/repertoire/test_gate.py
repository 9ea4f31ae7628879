"""Requests at the gate and at the operator's routes, over a whole controller without workers."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from chatserve.errors import ModelLoadError
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.repertoire import gate
from chatserve.server.repertoire.policy import LoadingPolicy
from tests.asgi import Answer, RunningApp, running
from tests.unit.server.repertoire.test_models import House

JSON = ("content-type", "application/json")
TOKEN = ("authorization", "Bearer token")
KEY = ("authorization", "Bearer key")
QUESTION = {"model": "a", "messages": [{"role": "user", "content": "hi"}]}


class Site:
    """A controller over a house with models a and b, and key and token."""

    def __init__(self, policy: LoadingPolicy, *, has_keys: bool = True) -> None:
        self.policy = policy
        self.keys = ["key"] if has_keys else []
        self.house: House

    def build(self) -> Edge:
        self.house = House(self.policy, a=1, b=1)
        self.house.declare("a", "b")
        return create_controller_app(
            self.house.registry,
            control_token="token",
            policy=AccessPolicy.build("127.0.0.1", api_keys=self.keys, control_token="token"),
            repertoire=self.house.repertoire,
        )

    def run(self, test: Callable[[RunningApp], Awaitable[None]]) -> None:
        async def build() -> Edge:
            return self.build()

        # the house belongs to the loop of the app
        app: Any = None

        async def lazily(scope: Any, receive: Any, send: Any) -> None:
            nonlocal app
            app = app or await build()
            await app(scope, receive, send)

        with running(lazily) as api:
            api.runner.run(asyncio.wait_for(test(api), 30))


async def post(api: RunningApp, path: str, body: Any, *headers: tuple[str, str]) -> Answer:
    return await api.call("POST", path, json.dumps(body).encode(), headers=(JSON, *headers))


AUTO = LoadingPolicy(auto_load=True, max_bytes=10**10, load_timeout_s=0.05)


def test_who_wants_no_stream_waits_so_long_and_the_load_goes_on() -> None:
    site = Site(AUTO)

    async def test(api: RunningApp) -> None:
        reply = await post(api, "/v1/chat/completions", QUESTION, KEY)
        assert (reply.status, reply.error["code"]) == (503, "model_not_loaded")
        assert "a is still being loaded after 0.05 s" in reply.error["message"]
        assert reply.headers["retry-after"] == "10"
        [model, _] = site.house.repertoire.models()
        assert model.phase == "loading" and model.num_held == 0
        site.house.workers[0].ready()
        await site.house.until(lambda: model.phase == "ready")

    site.run(test)


def test_a_stream_begins_before_its_model_is_there_and_tells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gate, "QUICK_S", 0.01)
    monkeypatch.setattr(gate, "TELL_S", 0.01)
    site = Site(AUTO)

    async def test(api: RunningApp) -> None:
        asking = asyncio.ensure_future(
            post(api, "/v1/chat/completions", {**QUESTION, "stream": True}, KEY)
        )
        while not site.house.workers:
            await asyncio.sleep(0.01)
        worker = site.house.workers[0]
        registry = site.house.registry
        registry.register(worker.worker_id, "http://a", worker.status("loading", loaded=7))
        [model, _] = site.house.repertoire.models()
        await asyncio.sleep(0.1)
        assert model.num_held == 1, "it may not be unloaded before the stream has a lease"
        worker.fail(ModelLoadError("bad shard"))
        reply = await asking
        assert reply.status == 200
        assert b": loading 7 0\n\n" in reply.body
        assert reply.body.endswith(b"\n\n") and b"[DONE]" not in reply.body
        assert b'"message":"a cannot be loaded: bad shard"' in reply.body
        assert model.num_held == 0

    site.run(test)


@pytest.mark.parametrize("fields", [{"stream": True}, {}])
def test_who_leaves_while_it_loads_holds_nothing_any_more(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "QUICK_S", 0.01)
    site = Site(dataclasses.replace(AUTO, load_timeout_s=1000))

    async def test(api: RunningApp) -> None:
        has_left = asyncio.Event()
        asking = asyncio.ensure_future(
            api.call(
                "POST", "/v1/chat/completions", json.dumps({**QUESTION, **fields}).encode(),
                headers=(JSON, KEY), has_left=has_left,
            )
        )  # fmt: skip
        while not site.house.workers:
            await asyncio.sleep(0.01)
        [model, _] = site.house.repertoire.models()
        await asyncio.sleep(0.05)
        assert model.num_held == 1
        has_left.set()
        await asking
        assert model.num_held == 0 and model.phase == "loading"
        site.house.workers[0].ready()
        await site.house.until(lambda: model.phase == "ready")

    site.run(test)


def test_what_goes_wrong_at_once_has_a_status_of_its_own() -> None:
    site = Site(AUTO)

    async def test(api: RunningApp) -> None:
        asking = asyncio.ensure_future(
            post(api, "/v1/chat/completions", {**QUESTION, "stream": True}, KEY)
        )
        while not site.house.workers:
            await asyncio.sleep(0)
        site.house.workers[0].fail(ModelLoadError("bad shard"))
        reply = await asking
        assert (reply.status, reply.error["code"]) == (503, "model_not_loaded")

    site.run(test)


@pytest.mark.parametrize("policy", [AUTO, LoadingPolicy()])
def test_a_model_that_a_worker_from_elsewhere_serves_is_not_loaded(policy: LoadingPolicy) -> None:
    site = Site(policy)

    async def test(api: RunningApp) -> None:
        card = ModelCard(name="a", created=1)
        status = WorkerStatus(state="ready", models=[card])
        site.house.registry.register("elsewhere", "http://127.0.0.1:9", status)
        reply = await post(api, "/v1/chat/completions", QUESTION, KEY)
        assert reply.error["code"] != "model_not_loaded" and not site.house.workers

    site.run(test)


def test_without_auto_load_the_way_out_is_named() -> None:
    site = Site(LoadingPolicy())

    async def test(api: RunningApp) -> None:
        reply = await post(api, "/v1/chat/completions", QUESTION, KEY)
        assert reply.status == 503 and "`chatserve load a`" in reply.error["message"]
        unknown = await post(api, "/v1/chat/completions", {**QUESTION, "model": "zz"}, KEY)
        assert unknown.status == 404
        cards = json.loads((await api.call("GET", "/v1/models", headers=[KEY])).body)["data"]
        assert [(card["id"], card["chatserve"]["state"]) for card in cards] == [
            ("a", "unloaded"), ("b", "unloaded"),
        ]  # fmt: skip
        one = await api.call("GET", "/v1/models/b", headers=[KEY])
        assert json.loads(one.body)["id"] == "b"
        ready = await api.call("GET", "/health/ready")
        assert ready.status == 200, "nothing is awaited"

    site.run(test)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/admin/models/load", {"model": "a", "wait": False}),
        ("/admin/models/unload", {"model": "a"}),
        ("/admin/workers/drain", {"id": "a-0"}),
    ],
)
@pytest.mark.parametrize("has_keys", [True, False])
def test_what_changes_something_always_takes_a_key_or_the_token(
    path: str, body: dict[str, Any], has_keys: bool
) -> None:
    site = Site(LoadingPolicy(), has_keys=has_keys)

    async def test(api: RunningApp) -> None:
        assert (await post(api, path, body)).status == 401
        assert (await post(api, path, body, ("authorization", "Bearer x"))).status == 401
        assert (await post(api, path, body, KEY)).status == (401 if not has_keys else ANY[path])
        assert (await post(api, path, body, TOKEN)).status == ANY[path]

    site.run(test)


ANY = {"/admin/models/load": 202, "/admin/models/unload": 200, "/admin/workers/drain": 404}


def test_a_path_takes_the_control_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    body = {"weights": str(tmp_path), "name": "mine", "wait": False}
    site = Site(LoadingPolicy())

    async def test(api: RunningApp) -> None:
        refused = await post(api, "/admin/models/load", body, KEY)
        assert (refused.status, refused.error["code"]) == (403, "operator_only")
        taken = await post(api, "/admin/models/load", body, TOKEN)
        assert taken.status == 202
        row = json.loads(taken.body)
        assert (row["name"], row["weights"], row["state"]) == ("mine", str(tmp_path), "loading")
        # where files lie is for operators
        listed = await api.call("GET", "/admin/models", headers=[KEY])
        assert {row["weights"] for row in json.loads(listed.body)["models"]} == {None}
        listed = await api.call("GET", "/admin/models", headers=[TOKEN])
        assert str(tmp_path) in listed.body.decode()
        assert (await api.call("GET", "/admin/models")).status == 401

    site.run(test)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "either `model` or `weights`"),
        ({"model": "a", "weights": "/x"}, "either `model` or `weights`"),
        ({"model": 3}, "model"),
        ({"model": "a", "force": True}, "force"),
        ({"model": ""}, "model"),
        ([], "JSON object"),
    ],
)
def test_a_body_that_says_nothing_sensible(body: Any, words: str) -> None:
    site = Site(LoadingPolicy())

    async def test(api: RunningApp) -> None:
        reply = await post(api, "/admin/models/load", body, TOKEN)
        assert reply.status == 400 and words in reply.error["message"]

    site.run(test)


def test_another_model_of_the_same_name_is_a_conflict(tmp_path: Path) -> None:
    site = Site(LoadingPolicy())

    async def test(api: RunningApp) -> None:
        body = {"weights": str(tmp_path), "name": "a"}
        reply = await post(api, "/admin/models/load", body, TOKEN)
        assert (reply.status, reply.error["code"]) == (409, "model_conflict")
        reply = await post(api, "/admin/models/unload", {"model": "zz"}, TOKEN)
        assert reply.status == 404 and "there is a, b" in reply.error["message"]

    site.run(test)


def test_a_controller_that_starts_no_workers_says_so() -> None:
    house_less = create_controller_app

    async def test() -> None:
        site = Site(LoadingPolicy())
        site.build()
        edge = house_less(site.house.registry, control_token="token")
        api = RunningApp(edge, None)  # type: ignore[arg-type]  # only `call` is used
        reply = await post(api, "/admin/models/load", {"model": "a"}, TOKEN)
        assert reply.status == 400 and "starts no workers itself" in reply.error["message"]
        worker = site.house._start("a", "a")
        worker.ready()
        reply = await post(api, "/admin/workers/drain", {"id": worker.worker_id}, TOKEN)
        assert json.loads(reply.body)["state"] == "draining"
        assert not site.house.registry.ready("a")
        [row] = json.loads((await api.call("GET", "/admin/models")).body)["models"]
        assert (row["name"], row["state"], row["running"]) == ("a", "draining", 0)
        worker.ready()  # started anew
        assert site.house.registry.ready("a")

    asyncio.run(test())


def test_a_worker_that_is_drained_by_its_id_is_unloaded() -> None:
    site = Site(AUTO)

    async def test(api: RunningApp) -> None:
        [model, _] = site.house.repertoire.models()
        await site.house.up(model)
        worker = site.house.workers[0]
        reply = await post(api, "/admin/workers/drain", {"id": worker.worker_id}, TOKEN)
        assert json.loads(reply.body) == {"id": worker.worker_id, "state": "draining", "running": 0}
        await site.house.until(lambda: model.phase == "unloaded")

    site.run(test)
