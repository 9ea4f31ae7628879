"""A worker's adapters: what goes on while they change, what is said, and who may."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from chatserve.engine.sequence import LoadedAdapter
from chatserve.errors import AdapterConflict
from chatserve.protocol.adapters import SETTLE_PATH, STAGE_PATH
from chatserve.server.adapter_routes import AdapterRoutes, OnChange, nobody_to_tell
from chatserve.server.edge import AccessPolicy
from chatserve.server.model_slot import ModelSlot
from chatserve.server.worker import create_slot_app
from tests.asgi import request
from tests.fakes import FakeAdapters, FakeEngine, FakeModel
from tests.unit.server.test_adapter_changes import asking
from tests.unit.server.test_edge import HOST, JSON

WAIT_S = 10.0


class Busy(FakeAdapters):
    """Another change is under way until `done` is set."""

    def __init__(self) -> None:
        super().__init__("sql")
        self.done = threading.Event()

    def _wait(self) -> None:
        assert self.done.wait(WAIT_S), "nothing else went on meanwhile"

    def load_below(self, name: str, path: str, *, replace: bool = False) -> LoadedAdapter:
        self._wait()
        return super().load_below(name, path)

    def stage_below(self, name: str, path: str, *, replace: bool = False) -> LoadedAdapter:
        self._wait()
        return super().stage_below(name, path)

    def settle(self, name: str, *, is_wanted: bool) -> None:
        self._wait()

    def unload(self, name: str) -> None:
        self._wait()
        super().unload(name)


def routes_of(table: FakeAdapters, on_change: OnChange = nobody_to_tell) -> AdapterRoutes:
    slot = ModelSlot.filled(FakeEngine(), FakeModel(names=("m",), adapters=table))
    return AdapterRoutes(slot, on_change)


@pytest.mark.parametrize(
    ("change", "body"),
    [
        (AdapterRoutes.load, {"lora_path": "x"}),
        (AdapterRoutes.stage, {"lora_path": "x"}),
        (AdapterRoutes.settle, {"is_wanted": False}),
        (AdapterRoutes.unload, {}),
    ],
)
def test_a_worker_goes_on_while_a_change_waits_for_another(change: Any, body: Any) -> None:
    table = Busy()
    routes = routes_of(table)

    async def main() -> None:
        changing = asyncio.create_task(change(routes, asking(lora_name="sql", **body)))
        asyncio.get_running_loop().call_soon(table.done.set)  # after the request has begun
        assert (await changing).status_code == 200

    asyncio.run(main())


def test_what_is_not_wanted_is_no_news() -> None:
    table = FakeAdapters()

    async def told() -> None:
        raise AssertionError("nothing has changed")

    async def main() -> None:
        routes = routes_of(table, told)
        await routes.stage(asking(lora_name="sql", lora_path="x"))
        reply = await routes.settle(asking(lora_name="sql", is_wanted=False))
        assert json.loads(reply.body) == {"id": "sql", "adapter": None}

    asyncio.run(main())
    assert not table.loaded()


def test_an_adapter_that_is_unloaded_before_it_is_confirmed_is_a_conflict() -> None:
    table = FakeAdapters()

    async def told() -> None:
        table.unload("sql")

    with pytest.raises(AdapterConflict, match="m:sql was unloaded while it was loaded"):
        asyncio.run(routes_of(table, told).load(asking(lora_name="sql", lora_path="x")))


@pytest.mark.parametrize("path", [STAGE_PATH, SETTLE_PATH])
def test_only_a_worker_with_a_controller_stages(path: str) -> None:
    slot = ModelSlot.filled(FakeEngine(), FakeModel())
    policy = AccessPolicy.build("127.0.0.1", api_keys=["key"])
    headers = [HOST, JSON, ("authorization", "Bearer key")]
    found = [
        request(
            create_slot_app(slot, policy=policy, control_token=token),
            method="POST", path=path, headers=headers, body=[b"{}"],
        ).status
        for token in (None, "token")
    ]  # fmt: skip
    assert found == [404, 400]
