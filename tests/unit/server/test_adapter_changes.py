"""Loading and unloading adapters on all workers of a base while other things happen."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, NamedTuple, cast

import aiohttp
import pytest
from starlette.requests import Request
from starlette.responses import Response

from chatserve.errors import InvalidRequest
from chatserve.protocol.adapters import SETTLE_PATH, STAGE_PATH, UNLOAD_PATH, LoadAdapter
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server import adapter_beliefs
from chatserve.server.adapter_beliefs import AdapterBeliefs
from chatserve.server.adapter_dispatch import AdapterDispatch
from chatserve.server.registry import WorkerRegistry
from tests.fakes import FakeClock

WAIT_S = 10.0


def asking(**body: str | bool) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    return Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)


class Told(NamedTuple):
    """What a worker is told, and waits to answer."""

    worker: str
    path: str
    body: dict[str, Any]
    answer: asyncio.Future[tuple[int, str]]


class Dispatch(AdapterDispatch):
    """Keeps what workers would be told until the test answers for them."""

    def __init__(self, registry: WorkerRegistry) -> None:
        no_session = cast(aiohttp.ClientSession, None)  # `_tell` is all that uses it
        super().__init__(registry, no_session, "t")
        self.registry = registry
        self.told: asyncio.Queue[Told] = asyncio.Queue()

    async def _tell(self, url: str, path: str, body: bytes) -> Response:
        answer: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        self.told.put_nowait(Told(url[-1], path, json.loads(body), answer))
        status, fingerprint = await answer
        error = {"message": "no room"} if status != 200 else None
        return Response(json.dumps({"adapter": fingerprint, "error": error}), status)

    async def answer(
        self, worker: int, path: str, status: int = 200, adapter: str = "ad_x"
    ) -> Told:
        """Let `worker`, the next to be told something, answer `path`."""
        told = await asyncio.wait_for(self.told.get(), WAIT_S)
        assert (told.worker, told.path) == (str(worker), path)
        told.answer.set_result((status, adapter))
        return told

    async def loaded(self, *workers: int, adapter: str = "ad_x", path: str = "x") -> None:
        """All of them load it as m:sql."""
        body = {"lora_name": "sql", "lora_path": path, "load_inplace": True}
        loading = asyncio.create_task(self.load(asking(**body)))
        for path in (STAGE_PATH, SETTLE_PATH):
            for worker in workers:
                await self.answer(worker, path, adapter=adapter)
        assert (await asyncio.wait_for(loading, WAIT_S)).status_code == 200
        for worker in workers:
            self.beat(worker, sql=adapter)

    async def unloaded(self, *workers: int) -> None:
        unloading = asyncio.create_task(self.unload(asking(lora_name="sql")))
        for worker in workers:
            await self.answer(worker, UNLOAD_PATH)
        assert (await asyncio.wait_for(unloading, WAIT_S)).status_code == 200
        for worker in workers:
            self.beat(worker)

    def add(self, port: int, **adapters: str) -> None:
        """As the controller does when a worker registers."""
        heard = self.hear(f"w{port}", status_of(adapters), registers=True)
        self.registry.register(f"w{port}", f"http://127.0.0.1:{port}", heard)
        self.restore(f"w{port}")

    def beat(self, port: int, **adapters: str) -> None:
        assert self.registry.heartbeat(f"w{port}", self.hear(f"w{port}", status_of(adapters)))
        self.restore(f"w{port}")


def status_of(adapters: dict[str, str]) -> WorkerStatus:
    cards = [ModelCard(name="m", created=1)]
    cards += [
        ModelCard(name=f"m:{name}", created=1, parent="m", description={"adapter": fingerprint})
        for name, fingerprint in adapters.items()
    ]
    return WorkerStatus(state="ready", models=cards)


def dispatch_of(*ports: int, clock: FakeClock | None = None) -> Dispatch:
    dispatch = Dispatch(WorkerRegistry(clock or FakeClock(), expected=["m"]))
    for port in ports:
        dispatch.add(port)
    return dispatch


async def idle() -> None:
    """Until nothing runs that does not wait for an answer."""
    for _ in range(20):
        await asyncio.sleep(0)


def serving(dispatch: Dispatch) -> set[str]:
    """The workers that a request for m:sql may reach."""
    return {worker.worker_id for worker in dispatch.registry.ready("m:sql")}


def test_a_name_that_is_too_long_with_its_base_is_refused() -> None:
    async def main() -> None:
        dispatch = dispatch_of(1)
        name = "x" * 299
        for change in (
            dispatch.load(asking(lora_name=name, lora_path="x")),
            dispatch.unload(asking(lora_name=name)),
        ):
            with pytest.raises(InvalidRequest, match="301 characters, the limit is 300"):
                await change

    asyncio.run(main())


def test_all_stage_an_adapter_before_one_serves_it() -> None:
    async def main() -> None:
        dispatch = dispatch_of(1, 2)
        loading = asyncio.create_task(dispatch.load(asking(lora_name="sql", lora_path="x")))
        await dispatch.answer(1, STAGE_PATH)
        staging = await asyncio.wait_for(dispatch.told.get(), WAIT_S)
        await idle()
        assert staging.path == STAGE_PATH and dispatch.told.empty(), "one is not ready yet"
        staging.answer.set_result((200, "ad_x"))
        for worker in (1, 2):
            told = await dispatch.answer(worker, SETTLE_PATH)
            assert told.body == {"lora_name": "m:sql", "is_wanted": True}
        assert (await loading).status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize("inplace", [False, True])
def test_what_one_refuses_none_serves(inplace: bool) -> None:
    async def main() -> None:
        dispatch = dispatch_of(1, 2, 3)
        for worker in (1, 2, 3):
            dispatch.beat(worker, sql="ad_of_the_command_line")
        asked = asking(lora_name="sql", lora_path="x", load_inplace=inplace)
        loading = asyncio.create_task(dispatch.load(asked))
        for worker, status in ((1, 200), (2, 503), (3, 200)):
            await dispatch.answer(worker, STAGE_PATH, status)
        for worker in (1, 3):
            told = await dispatch.answer(worker, SETTLE_PATH)
            assert not told.body["is_wanted"]
        reply = await loading
        message = json.loads(reply.body)["error"]["message"]
        assert reply.status_code == 503
        assert message == "no room (said by http://127.0.0.1:2; no worker has changed anything)"
        for worker in (1, 2, 3):
            dispatch.beat(worker, sql="ad_of_the_command_line")
        await idle()
        assert dispatch.told.empty() and serving(dispatch) == {"w1", "w2", "w3"}

    asyncio.run(main())


def test_workers_that_read_different_adapters_serve_none() -> None:
    async def main() -> None:
        dispatch = dispatch_of(1, 2)
        loading = asyncio.create_task(dispatch.load(asking(lora_name="sql", lora_path="x")))
        await dispatch.answer(1, STAGE_PATH, adapter="ad_1")
        await dispatch.answer(2, STAGE_PATH, adapter="ad_2")
        for worker in (1, 2):
            assert not (await dispatch.answer(worker, SETTLE_PATH)).body["is_wanted"]
        reply = await loading
        assert reply.status_code == 400
        assert b"(ad_1, ad_2); copy the same folder" in bytes(reply.body)

    asyncio.run(main())


def test_a_worker_lost_before_it_serves_is_told_again() -> None:
    async def main() -> None:
        dispatch = dispatch_of(1, 2)
        loading = asyncio.create_task(dispatch.load(asking(lora_name="sql", lora_path="x")))
        for worker in (1, 2):
            await dispatch.answer(worker, STAGE_PATH)
        await dispatch.answer(1, SETTLE_PATH)
        await dispatch.answer(2, SETTLE_PATH, 502)
        assert (await loading).status_code == 200
        dispatch.beat(2)
        # whatever it may have of that name
        assert (await dispatch.answer(2, STAGE_PATH, 502)).body["load_inplace"]
        await idle()
        dispatch.beat(2)
        for path in (STAGE_PATH, SETTLE_PATH):
            await dispatch.answer(2, path)
        await dispatch.aclose()

    asyncio.run(main())


def test_a_load_that_nobody_serves_is_none() -> None:
    async def main() -> None:
        dispatch = dispatch_of(1)
        loading = asyncio.create_task(dispatch.load(asking(lora_name="sql", lora_path="x")))
        await dispatch.answer(1, STAGE_PATH)
        await dispatch.answer(1, SETTLE_PATH, 502)
        assert (await loading).status_code == 502
        dispatch.beat(1)
        await idle()
        assert dispatch.told.empty()

    asyncio.run(main())


def test_an_ejected_worker_catches_up_before_a_request_reaches_it() -> None:
    async def main() -> None:
        dispatch = dispatch_of(1, 2)
        await dispatch.loaded(1, 2)

        async def away(*changes: Coroutine[Any, Any, None], **adapters: str) -> None:
            dispatch.registry.eject("w2")
            for change in changes:
                await change
            dispatch.beat(2, **adapters)
            await idle()
            assert dispatch.told.empty(), "it is not ready"
            dispatch.registry.readmit("w2")
            assert serving(dispatch) <= {"w1"}, "not with what it has"
            dispatch.beat(2, **adapters)

        # an unload
        await away(dispatch.unloaded(1), sql="ad_x")
        await dispatch.answer(2, UNLOAD_PATH)
        dispatch.beat(2)
        # a load
        await away(dispatch.loaded(1))
        told = await dispatch.answer(2, STAGE_PATH)
        assert told.body == {"lora_name": "m:sql", "lora_path": "x", "load_inplace": True}
        assert (await dispatch.answer(2, SETTLE_PATH)).body["is_wanted"]
        dispatch.beat(2, sql="ad_x")
        assert serving(dispatch) == {"w1", "w2"}
        # another one in its place
        await away(dispatch.loaded(1, adapter="ad_y", path="y"), sql="ad_x")
        assert (await dispatch.answer(2, STAGE_PATH, adapter="ad_y")).body["lora_path"] == "y"
        await dispatch.answer(2, SETTLE_PATH)
        dispatch.beat(2, sql="ad_y")
        assert serving(dispatch) == {"w1", "w2"}
        # of what it has missed twice it is told the end
        await away(dispatch.unloaded(1), dispatch.loaded(1), sql="ad_y")
        await dispatch.answer(2, STAGE_PATH)
        await dispatch.answer(2, SETTLE_PATH)
        dispatch.beat(2, sql="ad_x")
        await idle()
        assert dispatch.told.empty() and serving(dispatch) == {"w1", "w2"}
        await dispatch.aclose()

    asyncio.run(main())


def test_a_worker_that_registers_again_is_told_only_what_it_lacks() -> None:
    clock = FakeClock()

    async def main() -> None:
        dispatch = dispatch_of(1, 2, clock=clock)
        await dispatch.loaded(1, 2)
        clock.advance(60)  # both have been silent
        for worker in (1, 2):
            dispatch.add(worker, sql="ad_x")
        await idle()
        assert dispatch.told.empty() and serving(dispatch) == {"w1", "w2"}
        await dispatch.unloaded(1, 2)
        clock.advance(60)
        dispatch.add(1, sql="ad_x")
        assert not serving(dispatch)
        await dispatch.answer(1, UNLOAD_PATH)
        await dispatch.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("fault", ["refused", "changed"])
def test_a_worker_that_cannot_catch_up_serves_no_old_version(fault: str) -> None:
    async def main() -> None:
        dispatch = dispatch_of(1, 2)
        await dispatch.loaded(1, 2)
        dispatch.registry.eject("w2")
        await dispatch.loaded(1, adapter="ad_y", path="y")
        dispatch.registry.readmit("w2")
        dispatch.beat(2, sql="ad_x")
        if fault == "refused":
            await dispatch.answer(2, STAGE_PATH, 400)
        else:
            await dispatch.answer(2, STAGE_PATH, adapter="ad_z")
            assert not (await dispatch.answer(2, SETTLE_PATH)).body["is_wanted"]
        await idle()
        for _ in range(2):
            dispatch.beat(2, sql="ad_x")
            await idle()
        assert dispatch.told.empty(), "it is asked once"
        assert serving(dispatch) == {"w1"}
        await dispatch.loaded(1, 2, path="z")
        assert serving(dispatch) == {"w1", "w2"}

    asyncio.run(main())


def test_an_unload_comes_after_a_new_worker_got_what_the_others_have() -> None:
    async def main() -> None:
        dispatch = dispatch_of(1)
        await dispatch.loaded(1)
        dispatch.add(2)
        restored = await asyncio.wait_for(dispatch.told.get(), WAIT_S)
        assert (restored.worker, restored.path) == ("2", STAGE_PATH)
        unloading = asyncio.create_task(dispatch.unload(asking(lora_name="sql")))
        await idle()
        assert dispatch.told.empty(), "the worker would load it after it has been unloaded"
        restored.answer.set_result((200, "ad_x"))
        await dispatch.answer(2, SETTLE_PATH)
        for worker in (1, 2):
            await dispatch.answer(worker, UNLOAD_PATH)
        assert (await unloading).status_code == 200
        await dispatch.aclose()

    asyncio.run(main())


def test_a_new_worker_does_not_get_what_is_unloaded_first() -> None:
    async def main() -> None:
        dispatch = dispatch_of(1)
        await dispatch.loaded(1)
        again = asyncio.create_task(dispatch.load(asking(lora_name="sql", lora_path="x")))
        refused = await asyncio.wait_for(dispatch.told.get(), WAIT_S)
        unloading = asyncio.create_task(dispatch.unload(asking(lora_name="sql")))
        await idle()
        dispatch.add(2)
        await idle()
        assert dispatch.told.empty(), "a change is under way"
        refused.answer.set_result((400, ""))
        for worker in (1, 2):
            await dispatch.answer(worker, UNLOAD_PATH)
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
        dispatch = dispatch_of(1, 2)
        unloading = asyncio.create_task(dispatch.unload(asking(lora_name="sql")))
        for worker, each in enumerate(statuses, 1):
            await dispatch.answer(worker, UNLOAD_PATH, each)
        assert (await unloading).status_code == status

    asyncio.run(main())


def test_two_names_of_one_model_are_one_base() -> None:
    async def main() -> None:
        dispatch = dispatch_of()
        cards = [ModelCard(name=name, created=1) for name in ("m", "alias")]
        status = WorkerStatus(state="ready", models=cards)
        dispatch.registry.register("w1", "http://127.0.0.1:1", dispatch.hear("w1", status))
        for name, path in (("sql", "x"), ("alias:sql", "y")):
            asked = asking(lora_name=name, lora_path=path, load_inplace=True)
            loading = asyncio.create_task(dispatch.load(asked))
            told = await dispatch.answer(1, STAGE_PATH)
            assert told.body["lora_name"] == "m:sql"
            await dispatch.answer(1, SETTLE_PATH)
            assert (await loading).status_code == 200
        unloading = asyncio.create_task(dispatch.unload(asking(lora_name="alias:sql")))
        assert (await dispatch.answer(1, UNLOAD_PATH)).body == {"lora_name": "m:sql"}
        await unloading
        dispatch.restore("w1")
        await idle()
        assert dispatch.told.empty()

    asyncio.run(main())


def test_workers_that_left_are_forgotten() -> None:
    async def main() -> None:
        dispatch = dispatch_of(1)
        await dispatch.loaded(1)
        before = len(dispatch._beliefs)
        for port in (2, 3, 4, 5):
            dispatch.add(port)
            await dispatch.answer(port, STAGE_PATH)
            await dispatch.answer(port, SETTLE_PATH)
            await idle()
            (dispatch.registry.leave if port % 2 else dispatch.registry.remove)(f"w{port}")
        dispatch.beat(1, sql="ad_x")
        assert len(dispatch._beliefs) == before

    asyncio.run(main())


def test_what_has_been_unloaded_is_not_remembered_for_ever(monkeypatch: Any) -> None:
    monkeypatch.setattr(adapter_beliefs, "MAX_UNLOADED", 3)
    beliefs = AdapterBeliefs()
    asked = LoadAdapter(lora_name="m:sql", lora_path="x")
    for index in range(10):
        beliefs.loaded(("m", f"a{index}"), asked, "ad", [])
        beliefs.unloaded(("m", f"a{index}"), [])
        beliefs.unloaded(("m", f"nobody has had {index}"), [])
    beliefs.hear("w", status_of({f"a{index}": "ad" for index in range(10)}))
    assert [key[1] for key, _ in beliefs.differences("w")] == ["a7", "a8", "a9"]
    assert len(beliefs) == 3 + 1
