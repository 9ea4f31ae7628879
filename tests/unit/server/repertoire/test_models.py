"""Models in and out: one load for all who wait, room by need, drains, failures; no process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from chatserve.errors import (
    CannotLoad,
    ChatserveError,
    CrashLoop,
    DoesNotFit,
    ModelConflict,
    ModelLoadError,
    ModelNotLoaded,
    NoRoomForModel,
    ShuttingDown,
    WorkerLost,
)
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.protocol.measured import Measured
from chatserve.server.moves import Moves, ResumePolicy
from chatserve.server.registry import WorkerRegistry
from chatserve.server.repertoire import catalogue
from chatserve.server.repertoire.measure import Estimate
from chatserve.server.repertoire.model import Model
from chatserve.server.repertoire.models import COOL_S, Repertoire
from chatserve.server.repertoire.policy import LoadingPolicy
from chatserve.server.repertoire.rows import ModelRows
from tests.fakes import FakeClock

GB = 10**9


class FakeWorker:
    """Started and supervisor in one; it is ready, or ends, when the test says so."""

    def __init__(self, house: House, name: str, number: int) -> None:
        self.house = house
        self.name = name
        self.worker_id = f"{name}-{number}"
        self.supervisor = self
        self.pid = None
        self.end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_told_to_stop = asyncio.Event()
        self.may_stop = asyncio.Event()
        self.may_stop.set()

    async def run(self) -> None:
        await self.end

    def status(self, state: Any = "ready", loaded: int = 0) -> WorkerStatus:
        card = ModelCard(name=self.name, created=1)
        return WorkerStatus(state=state, models=[card], loaded_bytes=loaded)

    def ready(self) -> None:
        registry = self.house.registry
        registry.register(self.worker_id, f"http://{self.worker_id}", self.status())

    def fail(self, error: Exception) -> None:
        self.house.registry.remove(self.worker_id)
        self.end.set_exception(error)

    def retire(self) -> None: ...
    def hurry(self) -> None: ...
    def forget(self) -> None:
        self.house.registry.forget_family(self.name)

    async def stop(self, *, kill_after_s: float, hurry: asyncio.Event | None = None) -> None:
        self.is_told_to_stop.set()
        await self.may_stop.wait()
        self.house.registry.remove(self.worker_id)
        if not self.end.done():
            self.end.set_result(None)


class House:
    """A repertoire over a real registry, with fake workers; `sizes` by WEIGHTS."""

    def __init__(self, policy: LoadingPolicy, free: int = 10 * GB, **sizes: int) -> None:
        self.clock = FakeClock()
        self.registry = WorkerRegistry(self.clock)
        self.free = free
        self.sizes = sizes
        self.workers: list[FakeWorker] = []
        self.repertoire = Repertoire(self.registry, self._start, self._measure, self.clock, policy)

    def declare(self, *names: str, is_first: bool = False) -> list[Model]:
        return [self.repertoire.declare(name, name, is_first=is_first) for name in names]

    def _start(self, name: str, _weights: str) -> FakeWorker:
        self.workers.append(FakeWorker(self, name, len(self.workers)))
        return self.workers[-1]

    async def _measure(self, weights: str) -> Estimate | None:
        size = self.sizes.get(weights)
        return None if size is None else Estimate(size * GB, self.free)

    async def up(self, model: Model) -> None:
        loading = self.repertoire.load(model)
        await self.until(lambda: model.started is not None)
        self.workers[-1].ready()
        await loading

    async def until(self, is_true: Callable[[], bool]) -> None:
        for _ in range(1000):
            if is_true():
                return
            await asyncio.sleep(0)
        raise AssertionError("it does not come to that")


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


AUTO = LoadingPolicy(auto_load=True, max_bytes=10 * GB)


def test_ten_who_ask_at_once_start_one_load() -> None:
    async def test() -> None:
        house = House(AUTO, a=3)
        [model] = house.declare("a")
        asking = [asyncio.create_task(house.repertoire.until_ready(model)) for _ in range(10)]
        await house.until(lambda: bool(house.workers))
        assert model.phase == "loading" and not any(task.done() for task in asking)
        house.workers[0].ready()
        await asyncio.gather(*asking)
        assert len(house.workers) == 1 and model.phase == "ready"

    run(test())


def test_who_leaves_does_not_end_the_load_of_others() -> None:
    async def test() -> None:
        house = House(AUTO, a=3)
        [model] = house.declare("a")
        asking = [asyncio.create_task(house.repertoire.until_ready(model)) for _ in range(2)]
        await house.until(lambda: bool(house.workers))
        asking[0].cancel()
        await asyncio.gather(asking[0], return_exceptions=True)
        house.workers[0].ready()
        await asking[1]

    run(test())


def test_the_least_recently_used_makes_room() -> None:
    async def test() -> None:
        house = House(AUTO, a=4, b=4, c=5)
        a, b, c = house.declare("a", "b", "c")
        await house.up(a)
        house.clock.advance(1)
        await house.up(b)
        house.clock.advance(1)
        with house.repertoire.held(a):
            house.clock.advance(1)
        await house.up(c)
        assert (a.phase, b.phase, c.phase) == ("ready", "unloaded", "ready")
        assert house.workers[1].is_told_to_stop.is_set() and b.started is None

    run(test())


def test_who_makes_room_with_others_is_not_asked_meanwhile() -> None:
    async def test() -> None:
        house = House(AUTO, a=5, b=5, c=10)
        a, b, c = house.declare("a", "b", "c")
        await house.up(a)
        house.clock.advance(1)
        await house.up(b)
        house.workers[0].may_stop.clear()
        loading = house.repertoire.load(c)
        await house.until(lambda: house.workers[0].is_told_to_stop.is_set())
        # an answer of b that began now would be cut when the drain is over
        assert b.phase == "draining" and house.registry.ready("b") == []
        house.workers[0].may_stop.set()
        await house.until(lambda: len(house.workers) == 3)
        house.workers[2].ready()
        await loading
        assert (a.phase, b.phase, c.phase) == ("unloaded", "unloaded", "ready")

    run(test())


def test_who_has_requests_stays() -> None:
    async def test() -> None:
        house = House(AUTO, a=6, b=6)
        a, b = house.declare("a", "b")
        await house.up(a)
        with house.registry.pick("a"), pytest.raises(NoRoomForModel, match=r"a is busy in 6\.0 GB"):
            await house.repertoire.until_ready(b)
        assert (a.phase, b.phase) == ("ready", "unloaded")
        # and one on its way to the worker counts as well
        with house.repertoire.held(a), pytest.raises(NoRoomForModel):
            await house.repertoire.until_ready(b)
        await house.up(b)
        assert (a.phase, b.phase) == ("unloaded", "ready")

    run(test())


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (AUTO, "needs 11.0 GB, --max-loaded-bytes allows 10.0 GB"),
        (LoadingPolicy(auto_load=True), "needs 11.0 GB, there are 8.0 GB"),
    ],
)
def test_what_never_fits_is_a_400_with_numbers_and_unloads_nobody(
    policy: LoadingPolicy, words: str
) -> None:
    async def test() -> None:
        house = House(policy, free=6 * GB, a=2, b=11)
        a, b = house.declare("a", "b")
        await house.up(a)
        with pytest.raises(CannotLoad, match=words) as caught:
            await house.repertoire.until_ready(b)
        assert caught.value.exit_code == DoesNotFit.exit_code
        assert a.phase == "ready"

    run(test())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_gives_back_what_its_worker_holds_and_not_what_one_sequence_takes(
    device: str,
) -> None:
    async def test() -> None:
        house = House(LoadingPolicy(auto_load=True), free=2 * GB, a=1, b=10)
        a, b = house.declare("a", "b")
        await house.up(a)
        [worker] = house.workers
        measured = Measured(
            started_at=1.0, counters={}, outcomes={}, errors={}, histograms={}, device=device,
            **{"rss_bytes" if device == "cpu" else "device_used_bytes": 9 * GB},
        )  # fmt: skip
        status = worker.status().model_copy(update={"metrics": measured})
        house.registry.heartbeat(worker.worker_id, status)
        await house.up(b)
        assert (a.phase, b.phase) == ("unloaded", "ready")

    run(test())


def test_a_failure_that_is_told_to_many_keeps_nothing_of_them() -> None:
    async def test() -> None:
        house = House(AUTO, b=11)
        [b] = house.declare("b")
        for _ in range(3):
            with pytest.raises(CannotLoad) as caught:
                await house.repertoire.until_ready(b)
            assert caught.value is not b.failure

    run(test())


def test_wrong_weights_are_told_and_mended_without_a_restart() -> None:
    async def test() -> None:
        house = House(AUTO)
        repertoire = house.repertoire
        lasting = repertoire.declare("a", "/home/me/a")
        asked = repertoire.declare("b", "/home/me/b", is_lasting=False)
        for model in (lasting, asked):
            asking = asyncio.create_task(repertoire.until_ready(model))
            await house.until(lambda: model.started is not None)  # noqa: B023  # awaited here
            house.workers[-1].fail(ModelLoadError(f"no such folder: {model.weights}"))
            with pytest.raises(ModelNotLoaded, match=f"no such folder: {model.name}$"):
                await asking
        rows = ModelRows(house.registry, repertoire)
        for card in rows.cards():
            assert card["chatserve"]["state"] == "failed"
            assert card["chatserve"]["error"] == f"no such folder: {card['id']}"
        # whoever has mended the path does not wait until it is tried again
        await house.up(lasting)
        assert "error" not in rows.cards()[0]["chatserve"]
        # a path that was none does not keep its name
        with pytest.raises(ModelConflict):
            repertoire.declare("a", "/home/me/c", is_lasting=False)
        mended = repertoire.declare("b", "/home/me/c", is_lasting=False)
        assert mended is repertoire.find("b") is not asked
        await house.up(mended)

    run(test())


def test_names_that_were_none_take_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "MAX_MODELS", 2)

    async def test() -> None:
        house = House(AUTO)
        house.declare("a")
        for name in ("b", "c"):
            model = house.repertoire.declare(name, name, is_lasting=False)
            with pytest.raises(ModelConflict, match="2 models already"):
                house.declare("d")
            asking = house.repertoire.load(model)
            await house.until(lambda: model.started is not None)  # noqa: B023  # awaited here
            house.workers[-1].fail(ModelLoadError("no such model"))
            with pytest.raises(CannotLoad):
                await asking
        assert [each.name for each in house.repertoire.models()] == ["a", "c"]
        assert [each.name for each in house.registry.readiness()] == ["a", "c"]

    run(test())


@pytest.mark.parametrize(
    "error", [DoesNotFit("too big"), ModelConflict("was unloaded"), NoRoomForModel("busy")]
)
def test_each_who_waits_for_a_load_has_an_error_of_its_own(error: ChatserveError) -> None:
    async def test() -> None:
        house = House(AUTO, a=3)
        [a] = house.declare("a")
        asking = [asyncio.create_task(house.repertoire.until_ready(a)) for _ in range(2)]
        loading = [house.repertoire.load(a) for _ in range(2)]
        await house.until(lambda: bool(house.workers))
        house.workers[0].fail(error)
        told = await asyncio.gather(*asking, *loading, return_exceptions=True)
        assert len({id(each) for each in told} - {id(error), id(a.failure)}) == 4
        assert [str(each) for each in told] == [str(error)] * 4

    run(test())


def test_memory_that_others_are_about_to_take_is_not_free() -> None:
    async def test() -> None:
        house = House(LoadingPolicy(auto_load=True), free=10 * GB, a=6, b=6)
        a, b = house.declare("a", "b")
        first = house.repertoire.load(a)
        await house.until(lambda: a.started is not None)
        with pytest.raises(NoRoomForModel, match=r"4\.0 GB can be had; a is busy"):
            await house.repertoire.load(b)
        house.workers[0].ready()
        await first

    run(test())


def test_without_auto_load_nobody_is_unloaded_for_another() -> None:
    async def test() -> None:
        house = House(LoadingPolicy(max_bytes=10 * GB), a=6, b=6)
        a, b = house.declare("a", "b")
        await house.up(a)
        with pytest.raises(NoRoomForModel, match="unload a first"):
            await house.repertoire.load(b)
        with pytest.raises(ModelNotLoaded, match="`chatserve load b`"):
            await house.repertoire.until_ready(b)

    run(test())


def test_an_unload_waits_for_answers_and_then_for_the_process() -> None:
    async def test() -> None:
        house = House(AUTO, a=3)
        [model] = house.declare("a")
        await house.up(model)
        worker = house.workers[0]
        worker.may_stop.clear()
        unloading = asyncio.create_task(house.repertoire.unload(model))
        await worker.is_told_to_stop.wait()
        assert model.phase == "draining" and not house.registry.ready("a")
        worker.may_stop.set()
        await unloading
        assert model.phase == "unloaded" and model.started is None
        assert house.registry.is_ready()  # nobody waits for it

    run(test())


def test_an_answer_that_the_drain_was_too_short_for_waits_for_no_other_worker() -> None:
    async def test() -> None:
        house = House(AUTO, a=3)
        [model] = house.declare("a")
        await house.up(model)
        moves = Moves(house.registry, "a", ResumePolicy(timeout_s=1000))
        with await moves.next():
            await house.repertoire.unload(model)
        moves.leave(loss := WorkerLost("cut"))
        with pytest.raises(WorkerLost) as caught:
            await moves.next()
        assert caught.value is loss
        # while a worker that has crashed is waited for, and a model that comes back as well
        await house.up(model)
        house.registry.remove(house.workers[1].worker_id)
        waiting = asyncio.create_task(moves.next())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        house.workers[1].ready()
        (await waiting).release()

    run(test())


def test_a_load_during_the_drain_comes_after_it() -> None:
    async def test() -> None:
        house = House(AUTO, a=3)
        [model] = house.declare("a")
        await house.up(model)
        first = house.workers[0]
        first.may_stop.clear()
        unloading = asyncio.create_task(house.repertoire.unload(model))
        await first.is_told_to_stop.wait()
        asking = asyncio.create_task(house.repertoire.until_ready(model))
        await asyncio.sleep(0.01)
        assert len(house.workers) == 1 and not asking.done()
        first.may_stop.set()
        await unloading
        await house.until(lambda: len(house.workers) == 2)
        house.workers[1].ready()
        await asking

    run(test())


def test_an_unload_during_the_load_ends_it_and_tells_who_waits() -> None:
    async def test() -> None:
        house = House(AUTO, a=3)
        [model] = house.declare("a")
        asking = asyncio.create_task(house.repertoire.until_ready(model))
        await house.until(lambda: bool(house.workers))
        await house.repertoire.unload(model)
        with pytest.raises(ModelConflict, match="unloaded while"):
            await asking
        assert model.phase == "unloaded" and house.workers[0].is_told_to_stop.is_set()
        await house.up(model)

    run(test())


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ModelLoadError("no such folder: a"), ModelNotLoaded, "cannot be loaded: no such folder"),
        (DoesNotFit("needs 140 GB"), CannotLoad, "needs 140 GB"),
        (CrashLoop("it keeps crashing"), ModelNotLoaded, "keeps crashing"),
    ],
)
def test_who_asks_for_what_fails_is_told_in_its_own_words_and_others_go_on(
    error: ChatserveError, kind: type[ChatserveError], words: str
) -> None:
    async def test() -> None:
        house = House(AUTO, a=3, b=3)
        a, b = house.declare("a", "b")
        await house.up(b)
        asking = [asyncio.create_task(house.repertoire.until_ready(a)) for _ in range(3)]
        await house.until(lambda: len(house.workers) == 2)
        house.workers[1].fail(error)
        for each in asking:
            with pytest.raises(kind, match=words):
                await each
        assert (a.phase, b.phase) == ("failed", "ready")
        assert a.failure and a.failure.exit_code == error.exit_code  # type: ignore[attr-defined]
        # for a while it is not tried again, and then it is
        with pytest.raises(kind, match=words):
            await house.repertoire.until_ready(a)
        assert len(house.workers) == 2
        house.clock.advance(COOL_S)
        await house.up(a)

    run(test())


def test_a_first_model_that_is_no_use_ends_the_server_and_a_later_one_does_not() -> None:
    async def test() -> None:
        house = House(LoadingPolicy())
        [a] = house.declare("a", is_first=True)
        [b] = house.declare("b")
        living = asyncio.create_task(house.repertoire.outlive())
        await house.until(lambda: a.started is not None)
        house.workers[0].ready()
        await house.until(lambda: a.phase == "ready")
        later = house.repertoire.load(b)
        await house.until(lambda: b.started is not None)
        house.workers[1].fail(ModelLoadError("bad"))
        with pytest.raises(CannotLoad, match="bad"):
            await later
        assert not living.done()
        house.workers[0].fail(CrashLoop("again and again"))
        with pytest.raises(CrashLoop):
            await living

    run(test())


def test_first_models_that_do_not_fit_together_wait() -> None:
    async def test() -> None:
        house = House(AUTO, a=6, b=6)
        a, b = house.declare("a", "b", is_first=True)
        living = asyncio.create_task(house.repertoire.outlive())
        await house.until(lambda: a.started is not None)
        assert not house.registry.is_ready()
        house.workers[0].ready()
        await house.until(house.registry.is_ready)
        assert (a.phase, b.phase) == ("ready", "unloaded")
        living.cancel()
        await asyncio.gather(living, return_exceptions=True)

    run(test())


@pytest.mark.parametrize("policy", [AUTO, LoadingPolicy(auto_load=True)])
def test_a_first_model_that_a_request_has_begun_is_not_begun_again(policy: LoadingPolicy) -> None:
    async def test() -> None:
        house = House(policy, a=3, b=3)
        a, b = house.declare("a", "b", is_first=True)
        living = asyncio.create_task(house.repertoire.outlive())
        await house.until(lambda: a.started is not None)
        asking = asyncio.create_task(house.repertoire.until_ready(b))
        await house.until(lambda: b.started is not None)
        house.workers[0].ready()
        await house.until(lambda: a.phase == "ready")
        await asyncio.sleep(0.01)
        house.workers[1].ready()
        await asking
        assert b.phase == "ready" and len(house.workers) == 2
        living.cancel()
        await asyncio.gather(living, return_exceptions=True)

    run(test())


def test_the_end_of_the_server_is_told_to_who_waits_for_a_load() -> None:
    async def test() -> None:
        house = House(AUTO, a=3)
        [model] = house.declare("a")
        asking = asyncio.create_task(house.repertoire.until_ready(model))
        await house.until(lambda: bool(house.workers))
        await house.repertoire.close()
        with pytest.raises(ShuttingDown):
            await asking
        with pytest.raises(ShuttingDown):
            house.repertoire.load(model)
        with pytest.raises(ShuttingDown):
            house.repertoire.declare("b", "b")
        await house.repertoire.stop(kill_after_s=1, hurry=asyncio.Event())
        assert house.workers[0].end.done()

    run(test())


def test_two_models_of_one_name_are_refused() -> None:
    async def test() -> None:
        house = House(AUTO)
        house.repertoire.declare("a", "/x")
        assert house.repertoire.declare("a", "/x").weights == "/x"
        with pytest.raises(ModelConflict, match="another model is called a") as caught:
            house.repertoire.declare("a", "/y")
        assert "/x" not in caught.value.message, "whoever has a key would learn of a path"

    run(test())


def test_an_idle_model_is_unloaded_when_its_time_is_over_and_a_busy_one_is_not() -> None:
    async def test() -> None:
        house = House(LoadingPolicy(auto_load=True, keep_alive_s=0.2), a=1, b=1)
        a, b = house.declare("a", "b")
        living = asyncio.create_task(house.repertoire.outlive())
        await house.up(a)
        await house.up(b)
        with house.registry.pick("b"):
            house.clock.advance(1)
            await asyncio.wait_for(house.workers[0].is_told_to_stop.wait(), 20)
            assert not house.workers[1].is_told_to_stop.is_set()
        await asyncio.sleep(0)
        assert b.phase == "ready"
        living.cancel()
        await asyncio.gather(living, return_exceptions=True)

    run(test())
