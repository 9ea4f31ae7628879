"""Loading and unloading adapters while other things happen: in a worker, and in its controller."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine
from typing import Any, NamedTuple, cast

import aiohttp
import pytest
from starlette.requests import Request
from starlette.responses import Response

from chatserve.protocol.adapters import LOAD_PATH, UNLOAD_PATH
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server.adapter_dispatch import AdapterDispatch
from chatserve.server.adapter_routes import AdapterRoutes
from chatserve.server.model_slot import ModelSlot
from chatserve.server.registry import WorkerRegistry
from tests.fakes import FakeAdapters, FakeClock, FakeEngine, FakeModel

WAIT_S = 10.0


def asking(**body: str) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    return Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)


# ---- in a worker ----


class Busy(FakeAdapters):
    """Another change is under way until `done` is set."""

    def __init__(self) -> None:
        super().__init__("sql")
        self.done = threading.Event()

    def unload(self, name: str) -> None:
        assert self.done.wait(WAIT_S), "nothing else went on meanwhile"
        super().unload(name)


def test_a_worker_goes_on_while_an_unload_waits_for_a_load() -> None:
    table = Busy()
    routes = AdapterRoutes(ModelSlot.filled(FakeEngine(), FakeModel(adapters=table)))

    async def main() -> None:
        unloading = asyncio.create_task(routes.unload(asking(lora_name="sql")))
        asyncio.get_running_loop().call_soon(table.done.set)  # after the request has begun
        assert (await unloading).status_code == 200

    asyncio.run(main())
    assert not table.loaded()


# ---- in the controller ----


class Told(NamedTuple):
    """What a worker is told, and waits to answer."""

    worker: str
    path: str
    answer: asyncio.Future[int]


class Dispatch(AdapterDispatch):
    """Keeps what workers would be told until the test answers for them."""

    def __init__(self, registry: WorkerRegistry) -> None:
        no_session = cast(aiohttp.ClientSession, None)  # `_tell` is all that uses it
        super().__init__(registry, no_session, "t")
        self.told: asyncio.Queue[Told] = asyncio.Queue()

    async def _tell(self, url: str, path: str, body: bytes) -> Response:
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.told.put_nowait(Told(url[-1], path, answer))
        return Response(b"{}", await answer)

    async def next(self) -> Told:
        return await asyncio.wait_for(self.told.get(), WAIT_S)


def registry_of(*ports: int) -> WorkerRegistry:
    registry = WorkerRegistry(FakeClock(), expected=["m"])
    for port in ports:
        add(registry, port)
    return registry


def add(registry: WorkerRegistry, port: int) -> None:
    status = WorkerStatus(state="ready", models=[ModelCard(name="m", created=1)])
    registry.register(f"w{port}", f"http://127.0.0.1:{port}", status)


async def answered(dispatch: Dispatch, work: Coroutine[Any, Any, Response], *statuses: int) -> int:
    """The status of `work`, whose workers answer these in their order."""
    task = asyncio.create_task(work)
    for status in statuses:
        (await dispatch.next()).answer.set_result(status)
    return (await asyncio.wait_for(task, WAIT_S)).status_code


async def idle() -> None:
    """Until nothing runs that does not wait for an answer."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_an_unload_comes_after_a_new_worker_got_what_the_others_have() -> None:
    async def main() -> None:
        registry = registry_of(1)
        dispatch = Dispatch(registry)
        loading = dispatch.load(asking(lora_name="sql", lora_path="x"))
        assert await answered(dispatch, loading, 200) == 200
        add(registry, 2)
        dispatch.restore("w2")
        restored = await dispatch.next()
        assert (restored.worker, restored.path) == ("2", LOAD_PATH)
        unloading = asyncio.create_task(dispatch.unload(asking(lora_name="sql")))
        await idle()
        assert dispatch.told.empty(), "the worker would load it after it has been unloaded"
        restored.answer.set_result(200)
        for worker in "12":
            told = await dispatch.next()
            assert (told.worker, told.path) == (worker, UNLOAD_PATH)
            told.answer.set_result(200)
        assert (await unloading).status_code == 200
        await dispatch.aclose()

    asyncio.run(main())


def test_a_new_worker_does_not_get_what_is_unloaded_first() -> None:
    async def main() -> None:
        registry = registry_of(1)
        dispatch = Dispatch(registry)
        loading = dispatch.load(asking(lora_name="sql", lora_path="x"))
        assert await answered(dispatch, loading, 200) == 200
        again = asyncio.create_task(dispatch.load(asking(lora_name="sql", lora_path="x")))
        refused = await dispatch.next()
        unloading = asyncio.create_task(dispatch.unload(asking(lora_name="sql")))
        await idle()
        add(registry, 2)
        dispatch.restore("w2")
        await idle()
        assert dispatch.told.empty(), "a change is under way"
        refused.answer.set_result(400)
        for worker in "12":
            told = await dispatch.next()
            assert (told.worker, told.path) == (worker, UNLOAD_PATH)
            told.answer.set_result(200)
        assert [(await each).status_code for each in (again, unloading)] == [400, 200]
        await idle()
        assert dispatch.told.empty()
        await dispatch.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("statuses", "status"),
    [((200, 200), 200), ((200, 404), 200), ((404, 404), 404), ((200, 502), 502), ((503, 404), 503)],
)
def test_an_unload_that_a_worker_did_not_do_is_none(statuses: tuple[int, int], status: int) -> None:
    async def main() -> None:
        dispatch = Dispatch(registry_of(1, 2))
        unloading = dispatch.unload(asking(lora_name="sql"))
        assert await answered(dispatch, unloading, *statuses) == status

    asyncio.run(main())
