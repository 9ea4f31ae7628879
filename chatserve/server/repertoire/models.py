"""Repertoire: the models of a server, brought into memory and out of it, one worker each.

Decides nothing by itself about who makes room for whom (`policy.py`), and starts no process
(`workers.py`). Its clock is handed in. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator

from chatserve.errors import (
    CannotLoad,
    ChatserveError,
    DoesNotFit,
    ModelConflict,
    ModelNotLoaded,
    NoRoomForModel,
    ShuttingDown,
)
from chatserve.server.leases import Worker
from chatserve.server.registry import WorkerRegistry
from chatserve.server.repertoire.catalogue import Catalogue
from chatserve.server.repertoire.measure import Measure
from chatserve.server.repertoire.model import Model, Start
from chatserve.server.repertoire.policy import LoadingPolicy, expired
from chatserve.server.repertoire.room import Room

logger = logging.getLogger(__name__)

COOL_S = 5.0
"""After a load that failed nobody's request tries it again so soon."""
KILL_AFTER_S = 5.0
"""More than the drain may take."""
LOOK_S = 1.0


class Repertoire:
    """All models by name, the first ones first."""

    def __init__(
        self,
        registry: WorkerRegistry,
        start: Start,
        measure: Measure,
        clock: Callable[[], float],
        policy: LoadingPolicy,
        *,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.policy = policy
        self._registry = registry
        self._start = start
        self._measure = measure
        self._room = Room(policy, measure, self.worker_of, self.is_busy)
        self._clock = clock
        self._on_change = on_change
        self._catalogue = Catalogue(registry, clock)
        # who looks for room must not be misled by another one who does
        self._deciding = asyncio.Lock()
        self._fatal: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_closed = False

    # ---- which there are

    def declare(
        self, name: str, weights: str, *, is_first: bool = False, is_lasting: bool = True
    ) -> Model:
        """A model that can be loaded. Not `is_lasting`: one that could not gives its name away.

        Raises `ModelConflict`, or `ShuttingDown`.
        """
        if self._is_closed:
            raise _shutting_down()
        return self._catalogue.declare(name, weights, is_first=is_first, is_lasting=is_lasting)

    def models(self) -> list[Model]:
        return self._catalogue.models()

    def find(self, name: str) -> Model | None:
        """The model of that name; with an adapter, its base."""
        return self._catalogue.find(name)

    def worker_of(self, model: Model) -> Worker | None:
        return None if model.started is None else self._registry.find(model.started.worker_id)

    def is_served(self, name: str) -> bool:
        """By whatever worker: others may have registered one."""
        return bool(self._registry.ready(name))

    def is_busy(self, model: Model) -> bool:
        worker = self.worker_of(model)
        # what it says of itself may be seconds old
        return model.num_held > 0 or (worker is not None and bool(worker.leases))

    # ---- in

    async def _bring_first(self) -> None:
        """Load the models that the server was started with; where others can make room later, only
        those for which there is some."""
        first = [model for model in self.models() if model.is_first]
        if not self.policy.auto_load or (len(first) == 1 and self.policy.max_bytes is None):
            for model in first:
                self._load(model, is_measured=True)
            return
        for model in first:
            self._load(model, may_evict=False)
            try:
                await model.outcome()
            except ChatserveError as error:
                if self._fatal.done():
                    return
                logger.info("%s waits until it is asked for: %s", model.name, error.message)
                model.is_first = False
                self._registry.expect(model.name, is_awaited=False)

    def load(self, model: Model) -> asyncio.Future[None]:
        """Done when it is ready; the caller's own, others may wait for the same.

        Fails with `CannotLoad` in the worker's own words, `NoRoomForModel`, or `ModelConflict` when
        somebody unloads it meanwhile.
        """
        self._load(model)
        return model.outcome()

    async def until_ready(self, model: Model) -> None:
        """For a request: raises what to tell its client."""
        while model.phase != "ready":
            if not self.policy.auto_load:
                if model.phase == "loading":
                    return  # the registry says how far it is
                raise ModelNotLoaded(
                    f"{model.name} is {model.phase}; `chatserve load {model.name}` loads it",
                    retry_after_s=5,
                )
            if self._is_closed:
                raise _shutting_down()
            failure = model.failure
            if failure is None or self._clock() - model.failed_at >= COOL_S:
                try:
                    await self.load(model)
                    continue
                except CannotLoad as error:
                    failure = error
            reason = model.without_path(failure.message)
            if failure.exit_code == DoesNotFit.exit_code:
                # the one that is kept would keep the frames of all who are told
                raise CannotLoad(reason, exit_code=failure.exit_code)
            raise ModelNotLoaded(
                f"{model.name} cannot be loaded: {reason}", retry_after_s=int(COOL_S)
            )

    @contextlib.contextmanager
    def held(self, model: Model) -> Iterator[None]:
        """Nobody unloads it for want of room or use; a lease goes on with that."""
        model.num_held += 1
        try:
            yield
        finally:
            model.num_held -= 1
            model.used_at = self._clock()

    # ---- out

    async def unload(self, model: Model) -> None:
        """Let its answers end, then its worker; returns when the memory is back."""
        await self._stop_loading(
            model, ModelConflict(f"{model.name} was unloaded while it was being loaded")
        )
        if model.going is None:
            if model.started is None:
                model.phase, model.failure = "unloaded", None
                self._on_change()
                return
            self._send_away(model)
        assert model.going is not None
        await asyncio.shield(model.going)

    # ---- the server's own life

    async def outlive(self) -> None:
        """Load the first models and look after idle ones, until one of the first is no use: raises
        its `StartupError`."""
        jobs = [
            asyncio.create_task(job)
            for job in (self._bring_first(), self._look(), self._measure_declared())
        ]
        try:
            await asyncio.shield(self._fatal)
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

    async def close(self) -> None:
        """Load nothing more, start nothing again; workers go on with what they have."""
        self._is_closed = True
        for model in self.models():
            if model.started is not None:
                model.started.supervisor.retire()
            if model.bringing is not None:
                await self._stop_loading(model, _shutting_down())

    def hurry(self) -> None:
        """Let answers end now, with an error each."""
        for model in self.models():
            if model.started is not None:
                model.started.supervisor.hurry()

    async def stop(self, *, kill_after_s: float, hurry: asyncio.Event) -> None:
        started = [each.started for each in self.models() if each.started is not None]
        await asyncio.gather(
            *(each.supervisor.stop(kill_after_s=kill_after_s, hurry=hurry) for each in started)
        )
        tasks = [
            task
            for each in self.models()
            for task in (each.running, each.going)
            if task is not None
        ]
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- how

    def _load(self, model: Model, *, may_evict: bool = True, is_measured: bool = False) -> None:
        if model.loaded is not None and (model.is_loading or model.phase == "ready"):
            return  # whoever has begun it
        if self._is_closed:
            raise _shutting_down()
        model.loaded = asyncio.get_running_loop().create_future()
        if model.going is None:
            model.phase, model.failure = "loading", None
        if is_measured and model.going is None:
            self._start_worker(model)
        model.bringing = asyncio.create_task(self._bring(model, may_evict))
        self._on_change()

    async def _bring(self, model: Model, may_evict: bool) -> None:
        try:
            if model.going is not None:
                await asyncio.shield(model.going)
                model.phase, model.failure = "loading", None
            if model.started is None:
                async with self._deciding:
                    await self._make_room(model, may_evict)
                    self._start_worker(model)
            await self._until_up(model)
        except ChatserveError as error:
            self._give_up(model, error)
        except Exception as error:  # a bug must not let anybody wait for ever
            logger.exception("loading %s failed", model.name)
            self._give_up(model, CannotLoad(f"{model.name}: {type(error).__name__}: {error}"))
        else:
            model.phase, model.used_at = "ready", self._clock()
            assert model.loaded is not None
            model.loaded.set_result(None)
        self._on_change()

    def _start_worker(self, model: Model) -> None:
        self._registry.retire(model.name, is_over=True)
        model.started = self._start(model.name, model.weights)
        model.running = asyncio.create_task(model.started.supervisor.run())
        model.running.add_done_callback(lambda task: self._ended(model, task))

    def _ended(self, model: Model, task: asyncio.Task[None]) -> None:
        """A worker that nobody has told to end was given up."""
        if task.cancelled() or task.exception() is None or model.running is not task:
            return
        error = task.exception()
        assert error is not None
        # where others make room, too little of it is no reason to end
        may_wait = self.policy.auto_load and isinstance(error, DoesNotFit)
        is_alone = not any(each.phase == "ready" for each in self.models())
        if model.is_first and not self._fatal.done() and (is_alone or not may_wait):
            self._fatal.set_exception(error)
            self._fatal.exception()
        if model.phase == "ready":
            reason = error if isinstance(error, ChatserveError) else CannotLoad(str(error))
            model.fail(reason, self._clock())
            self._clear(model)
            self._on_change()

    async def _until_up(self, model: Model) -> None:
        """Raises the `StartupError` that its worker ended with."""
        running = model.running
        assert running is not None
        with self._registry.changes() as change:
            while not self._is_up(model):
                change.clear()
                waiter = asyncio.ensure_future(change.wait())
                try:
                    await asyncio.wait({running, waiter}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    waiter.cancel()
                if running.done():
                    running.result()
                    raise ModelConflict(f"{model.name} was stopped while it was being loaded")

    def _is_up(self, model: Model) -> bool:
        assert model.started is not None
        worker_id = model.started.worker_id
        return any(each.worker_id == worker_id for each in self._registry.ready(model.name))

    def _give_up(self, model: Model, error: ChatserveError) -> None:
        if isinstance(error, NoRoomForModel | ModelConflict):
            model.phase = "unloaded"
        else:
            model.fail(error, self._clock())
        if model.running is None or model.running.done():
            self._clear(model)
        assert model.phase == "unloaded" or model.failure is not None
        model.give_up(error if model.failure is None else model.failure)

    async def _stop_loading(self, model: Model, error: ChatserveError) -> None:
        bringing = model.bringing
        if bringing is None or bringing.done():
            return
        model.give_up(error)
        bringing.cancel()
        await asyncio.gather(bringing, return_exceptions=True)

    def _send_away(self, model: Model) -> asyncio.Task[None]:
        """From now on it gets nothing more to do: what was decided about it stays true. Done when
        its memory is back."""
        assert model.started is not None
        model.is_first = False
        model.phase = "draining"
        self._registry.expect(model.name, is_awaited=False)
        self._registry.set_aside(model.started.worker_id)
        self._registry.retire(model.name)
        model.going = going = asyncio.create_task(self._take_down(model))
        going.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._on_change()
        return going

    async def _take_down(self, model: Model) -> None:
        started, running = model.started, model.running
        assert started is not None and running is not None
        try:
            await started.supervisor.stop(kill_after_s=self.policy.drain_s + KILL_AFTER_S)
            await asyncio.gather(running, return_exceptions=True)
        finally:
            self._clear(model)
            model.going = None
            model.phase, model.failure = "unloaded", None
            self._on_change()

    def _clear(self, model: Model) -> None:
        if model.started is not None:
            model.started.forget()
        model.started = model.running = None

    async def _make_room(self, model: Model, may_evict: bool) -> None:
        """Raises `NoRoomForModel`, or `CannotLoad` where there can be none."""

        def others() -> list[Model]:
            return [each for each in self.models() if each.started and each is not model]

        while going := await self._room.look(model, others, may_evict):
            logger.info("%s makes room for %s", ", ".join(going), model.name)
            # all at once: who waited for its turn would get requests meanwhile
            await asyncio.wait([self._send_away(self._catalogue[name]) for name in going])
            if self.policy.max_bytes is None:
                return  # memory that has just come back may be counted late; the worker looks again

    # ---- looking after

    async def _look(self) -> None:
        keep_alive_s = self.policy.keep_alive_s
        look_s = LOOK_S if keep_alive_s is None else min(LOOK_S, max(0.05, keep_alive_s / 4))
        while True:
            await asyncio.sleep(look_s)
            now = self._clock()
            ready = [each for each in self.models() if each.phase == "ready"]
            for model in ready:
                if self.is_busy(model):
                    model.used_at = now
            if keep_alive_s is None:
                continue
            for name in expired(map(self._room.holding, ready), now, keep_alive_s):
                logger.info("%s was not used for %g s and is unloaded", name, keep_alive_s)
                # its answers have ended: it does not take long, and does not keep others waiting
                self._send_away(self._catalogue[name])

    async def _measure_declared(self) -> None:
        """So that the list of models can say what each would take."""
        for model in self.models():
            if model.num_bytes is None and model.started is None:
                estimate = await self._measure(model.weights)
                if estimate is not None and model.num_bytes is None:
                    model.num_bytes = estimate.num_bytes
                    self._on_change()


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the server is shutting down; try again when it is back")
