"""Adapters of several workers: one is late, lost, away or talks nonsense while they change."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import aiohttp
import pytest
from starlette.responses import Response

from chatserve.errors import InvalidRequest, NoWorkerAvailable
from chatserve.protocol.adapters import SETTLE_PATH, STAGE_PATH, UNLOAD_PATH, LoadAdapter
from chatserve.server import adapter_beliefs, adapter_dispatch
from chatserve.server.adapter_beliefs import AdapterBeliefs
from chatserve.server.adapter_dispatch import AdapterDispatch
from chatserve.server.leases import Worker
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker_client import WorkerClient
from tests.fakes import FakeClock
from tests.unit.server.test_adapter_changes import (
    WAIT_S,
    asking,
    dispatch_of,
    idle,
    serving,
    status_of,
)


def test_workers_change_over_each_at_its_own_time() -> None:
    async def main() -> None:
        dispatch = dispatch_of(1, 2)
        await dispatch.loaded(1, 2)
        body = {"lora_name": "sql", "lora_path": "y", "load_inplace": True}
        loading = asyncio.create_task(dispatch.load(asking(**body)))
        for worker in (1, 2):
            await dispatch.answer(worker, STAGE_PATH, adapter="ad_y")
        await dispatch.answer(1, SETTLE_PATH)
        dispatch.beat(1, sql="ad_y")
        assert serving(dispatch) == {"w1", "w2"}, "both are right until both have changed over"
        dispatch.beat(2, sql="ad_y")  # before it confirms the change
        await dispatch.answer(2, SETTLE_PATH)
        assert (await loading).status_code == 200
        assert serving(dispatch) == {"w1", "w2"}
        dispatch.beat(1, sql="ad_x")
        assert serving(dispatch) == {"w2"}, "from now on one version is right"

    asyncio.run(main())


def test_a_change_that_breaks_off_leaves_the_old_version() -> None:
    beliefs = AdapterBeliefs()
    beliefs.loaded(("m", "sql"), LoadAdapter(lora_name="m:sql", lora_path="x"), "ad_x", [])
    with pytest.raises(asyncio.CancelledError), beliefs.incoming(("m", "sql"), "ad_y"):
        assert len(beliefs.hear("w", status_of({"sql": "ad_y"})).models) == 2
        raise asyncio.CancelledError
    assert [card.name for card in beliefs.hear("w", status_of({"sql": "ad_y"})).models] == ["m"]


def test_a_heartbeat_that_crosses_a_load_brings_no_second_one() -> None:
    async def main() -> None:
        dispatch = dispatch_of(1)
        loading = asyncio.create_task(dispatch.load(asking(lora_name="sql", lora_path="x")))
        for path in (STAGE_PATH, SETTLE_PATH):
            await dispatch.answer(1, path)
        await loading
        dispatch.beat(1)
        await idle()
        assert dispatch.told.empty()

    asyncio.run(main())


def test_an_adapter_of_the_command_line_is_unloaded_everywhere() -> None:
    async def main() -> None:
        dispatch = dispatch_of(1, 2)
        for worker in (1, 2):
            dispatch.beat(worker, sql="ad_of_the_command_line")
        dispatch.registry.eject("w2")
        await dispatch.unloaded(1)
        dispatch.registry.readmit("w2")
        dispatch.beat(2, sql="ad_of_the_command_line")
        assert not serving(dispatch)
        await dispatch.answer(2, UNLOAD_PATH)
        await dispatch.aclose()

    asyncio.run(main())


def test_a_worker_that_did_not_answer_an_unload_is_told_again() -> None:
    async def main() -> None:
        dispatch = dispatch_of(1, 2)
        await dispatch.loaded(1, 2)
        unloading = asyncio.create_task(dispatch.unload(asking(lora_name="sql")))
        for worker, status in ((1, 200), (2, 502)):
            await dispatch.answer(worker, UNLOAD_PATH, status)
        assert (await unloading).status_code == 502
        dispatch.beat(2, sql="ad_x")
        assert not serving(dispatch) & {"w2"}
        await dispatch.answer(2, UNLOAD_PATH)
        await dispatch.aclose()

    asyncio.run(main())


def test_heartbeats_during_a_change_add_no_tasks_and_the_end_waits_for_none() -> None:
    async def main() -> None:
        dispatch = dispatch_of(1)
        await dispatch.loaded(1)
        dispatch.add(2)
        told = await asyncio.wait_for(dispatch.told.get(), WAIT_S)
        before = len(asyncio.all_tasks())
        for _ in range(3):
            dispatch.beat(2)
        assert len(asyncio.all_tasks()) == before
        await asyncio.wait_for(dispatch.aclose(), WAIT_S)
        assert told.answer.cancelled()

    asyncio.run(main())


def test_without_a_worker_there_is_nothing_to_load() -> None:
    async def main() -> None:
        dispatch = dispatch_of()
        with pytest.raises(InvalidRequest, match="no model is ready yet; write BASE:sql"):
            await dispatch.load(asking(lora_name="sql", lora_path="x"))
        dispatch.add(1)
        dispatch.registry.eject("w1")
        with pytest.raises(NoWorkerAvailable):
            await dispatch.load(asking(lora_name="m:sql", lora_path="x"))

    asyncio.run(main())


class Session:
    """Stands in for HTTP: every worker says the same, or fails, or says nothing."""

    def __init__(self, status: int = 200, content: bytes = b"", error: Any = None) -> None:
        self.status, self._content, self._error = status, content, error
        self.content = self

    def post(self, base_url: str, path: str, **options: Any) -> Session:
        return self

    async def __aenter__(self) -> Session:
        if self._error is not None:
            raise self._error
        return self

    async def __aexit__(self, *caught: object) -> None: ...

    async def read(self, most: int = -1) -> bytes:
        if self.status == 0:
            await asyncio.Event().wait()
        return self._content[:most] if most >= 0 else self._content


def said_to_a_load(session: Session) -> Response:
    registry = WorkerRegistry(FakeClock(), expected=["m"])
    registry.register("w1", "http://127.0.0.1:1", status_of({}))
    registry.register("w2", "http://127.0.0.1:2", status_of({}))

    async def main() -> Response:
        dispatch = AdapterDispatch(registry, cast(WorkerClient, session), "t")
        return await dispatch.load(asking(lora_name="sql", lora_path="x"))

    return asyncio.run(main())


@pytest.mark.parametrize(
    "session",
    [
        Session(error=aiohttp.ClientError("cut off")),
        Session(error=ConnectionResetError()),
        Session(0),
    ],
    ids=["client", "system", "silence"],
)
def test_a_worker_that_says_nothing_is_lost(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_dispatch, "TIMEOUT_S", 0.01)
    reply = said_to_a_load(session)
    assert reply.status_code == 502 and b"a worker did not answer" in bytes(reply.body)


EXPIRY_S, STALL_S = 10.0, 30.0


async def looked_at(dispatch: AdapterDispatch, count: int = 3) -> None:
    """Until it has been seen `count` times whether a worker is still there."""
    looks: asyncio.Queue[None] = asyncio.Queue()
    look = AdapterDispatch._is_there

    def noted(worker: Worker) -> bool:
        looks.put_nowait(None)
        return look(dispatch, worker)

    dispatch._is_there = noted  # type: ignore[method-assign]
    for _ in range(count):
        await asyncio.wait_for(looks.get(), WAIT_S)


@pytest.fixture
def look_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_dispatch, "LOOK_S", 0.01)


@pytest.mark.usefixtures("look_soon")
@pytest.mark.parametrize("how", ["silent", "ejected", "stalled", "leaves"])
@pytest.mark.parametrize("when", [STAGE_PATH, SETTLE_PATH])
def test_a_worker_that_is_lost_holds_up_no_change(how: str, when: str) -> None:
    """It is taken for lost by its heartbeats, long before a large adapter would be."""

    async def main() -> None:
        clock = FakeClock()
        dispatch = dispatch_of(1, 2, clock=clock)
        loading = asyncio.create_task(dispatch.load(asking(lora_name="sql", lora_path="x")))
        if when == SETTLE_PATH:
            await dispatch.answer(1, STAGE_PATH)
            await dispatch.answer(2, STAGE_PATH)
        await dispatch.answer(1, when)
        told = await asyncio.wait_for(dispatch.told.get(), WAIT_S)
        assert told.worker == "2"
        await looked_at(dispatch)
        assert not loading.done(), "it still beats"
        if how == "silent":
            clock.advance(EXPIRY_S - 1)
            dispatch.beat(1)
            clock.advance(2)
        elif how == "ejected":
            dispatch.registry.eject("w2")
        elif how == "stalled":
            for _ in range(5):
                clock.advance(STALL_S / 4)
                dispatch.beat(1)
                busy = status_of({}).model_copy(update={"num_running": 1})
                dispatch.registry.heartbeat("w2", busy)
        else:
            dispatch.registry.leave("w2")
        if when == STAGE_PATH:
            await dispatch.answer(1, SETTLE_PATH)  # w1 lets go of it
            reply = await asyncio.wait_for(loading, WAIT_S)
            assert reply.status_code == 502 and b"it was lost meanwhile" in bytes(reply.body)
        else:
            assert (await asyncio.wait_for(loading, WAIT_S)).status_code == 200
        assert told.answer.cancelled(), "nobody listens any more"
        # and the next change is one of w1 alone
        dispatch.registry.leave("w2")
        await dispatch.loaded(1)

    asyncio.run(main())


@pytest.mark.usefixtures("look_soon")
def test_a_worker_that_loads_for_long_and_beats_is_waited_for() -> None:
    async def main() -> None:
        clock = FakeClock()
        dispatch = dispatch_of(1, clock=clock)
        loading = asyncio.create_task(dispatch.load(asking(lora_name="sql", lora_path="x")))
        told = await asyncio.wait_for(dispatch.told.get(), WAIT_S)
        for _ in range(20):
            clock.advance(EXPIRY_S - 1)
            dispatch.beat(1)
            await looked_at(dispatch, 1)
        assert not loading.done()
        told.answer.set_result((200, "ad_x"))
        await dispatch.answer(1, SETTLE_PATH)
        assert (await asyncio.wait_for(loading, WAIT_S)).status_code == 200

    asyncio.run(main())


@pytest.mark.usefixtures("look_soon")
def test_a_new_worker_that_falls_silent_while_it_is_put_right_holds_up_no_change() -> None:
    async def main() -> None:
        clock = FakeClock()
        dispatch = dispatch_of(1, clock=clock)
        await dispatch.loaded(1)
        dispatch.add(2)
        told = await asyncio.wait_for(dispatch.told.get(), WAIT_S)
        assert told.worker == "2"
        clock.advance(EXPIRY_S - 1)
        dispatch.beat(1, sql="ad_x")
        clock.advance(2)
        await dispatch.unloaded(1)

    asyncio.run(main())


@pytest.mark.parametrize("content", [b"<html>", b"[]", b"5", b'{"error": "x"}', b'{"error": []}'])
@pytest.mark.parametrize("status", [200, 500])
def test_answers_that_no_worker_of_ours_gives(status: int, content: bytes) -> None:
    reply = said_to_a_load(Session(status, content))
    assert (reply.status_code, bytes(reply.body)) == (status, content)


def test_no_answer_is_read_without_end() -> None:
    reply = said_to_a_load(Session(500, b"x" * (adapter_dispatch.MAX_REPLY_BYTES + 1)))
    assert len(bytes(reply.body)) == adapter_dispatch.MAX_REPLY_BYTES


def test_what_is_told_and_unloaded_again_and_again_is_remembered_once(monkeypatch: Any) -> None:
    monkeypatch.setattr(adapter_beliefs, "MAX_UNLOADED", 3)
    beliefs = AdapterBeliefs()
    asked = LoadAdapter(lora_name="m:sql", lora_path="x")
    for name in ("a0", "a1", "a2", "a0", "a3"):
        beliefs.loaded(("m", name), asked, "ad", ["w"])
        beliefs.unloaded(("m", name), ["w"])
    beliefs.hear("w2", status_of({f"a{index}": "ad" for index in range(4)}))
    assert [key[1] for key, _ in beliefs.differences("w2")] == ["a2", "a0", "a3"]
    for _ in range(10):
        beliefs.loaded(("m", "sql"), asked, "ad", ["w"])
    # four beliefs, what w2 has brought, and w with what it was told of these
    assert len(beliefs) <= 4 + 1 + 1 + 4
