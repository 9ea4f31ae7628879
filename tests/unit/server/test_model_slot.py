"""Loading, ready, draining: what a worker says of itself."""

from __future__ import annotations

import asyncio

import pytest

from chatserve.errors import GenerationFailed, NoWorkerAvailable
from chatserve.server import worker_process
from chatserve.server.model_slot import ModelSlot
from tests.fakes import FakeEngine, FakeModel, FakeStats


def test_empty_slot_reports_progress_and_serves_nothing() -> None:
    slot = ModelSlot(["m"])
    with pytest.raises(NoWorkerAvailable, match="m is still loading; "):
        slot.served()
    slot.progress(30, 120)
    status = slot.status()
    assert (status.state, status.loaded_bytes, status.total_bytes) == ("loading", 30, 120)
    assert [card.name for card in status.models] == ["m"]
    with pytest.raises(NoWorkerAvailable, match=r"loading \(25 %\)"):
        slot.served()


def test_filled_slot_reports_the_engine() -> None:
    engine, model = FakeEngine(), FakeModel(names=("a", "b"))
    engine.current = FakeStats(tick=5, num_running=2, num_waiting=1, last_token_age_s=0.5)
    slot = ModelSlot.filled(engine, model)
    assert slot.served() == (engine, model)
    status = slot.status()
    assert (status.state, status.tick, status.num_running, status.num_waiting) == ("ready", 5, 2, 1)
    assert status.last_token_age_s == 0.5 and status.fingerprint == "fp_fake"
    assert [card.name for card in status.models] == ["a", "b"]
    assert status.models[0].context_length == 1000
    slot.is_draining = True
    assert slot.status().state == "draining"


@pytest.mark.parametrize(
    ("age_s", "is_alive", "is_stalled"),
    [(0, True, False), (2, True, False), (2.5, True, True), (0, False, True)],
)
def test_an_engine_that_hangs_or_has_died(age_s: float, is_alive: bool, is_stalled: bool) -> None:
    slot = ModelSlot(["m"], stall_s=2)
    assert not slot.is_stalled
    engine = FakeEngine()
    engine.current = FakeStats(last_token_age_s=age_s, is_alive=is_alive)
    slot.fill(engine, FakeModel())
    assert slot.is_stalled == is_stalled
    assert slot.status().state == ("stalled" if is_stalled else "ready")
    slot.is_draining = True
    assert slot.status().state == "draining"


def watch(*looks: FakeStats, patience_s: float) -> None:
    """The last look stays."""

    left = list(looks)

    class Engine(FakeEngine):
        def stats(self) -> FakeStats:
            return left.pop(0) if len(left) > 1 else left[0]

    async def main() -> None:
        async with asyncio.timeout(20):
            slot = ModelSlot.filled(Engine(), FakeModel())
            await worker_process._watch_engine(slot, patience_s)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("stats", "words"),
    [
        (FakeStats(last_token_age_s=2.5), r"no step for 0.02 s"),
        (FakeStats(is_alive=False), "has died"),
    ],
)
def test_a_worker_ends_itself_when_its_engine_hangs_for_long(
    stats: FakeStats, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "ENGINE_CHECK_S", 0.005)
    with pytest.raises(GenerationFailed, match=words):
        watch(stats, patience_s=0.02)


def test_a_process_that_was_stopped_and_goes_on_has_a_step_to_make(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_process, "ENGINE_CHECK_S", 0.005)
    idle, late, dead = FakeStats(), FakeStats(last_token_age_s=1000), FakeStats(is_alive=False)
    with pytest.raises(GenerationFailed, match="has died"):
        watch(*[idle] * 9, late, late, idle, late, late, dead, patience_s=0.02)
