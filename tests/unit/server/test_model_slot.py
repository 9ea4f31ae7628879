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


@pytest.mark.parametrize(
    ("stats", "words"),
    [
        (FakeStats(last_token_age_s=2.5), "no step for 2 s"),
        (FakeStats(is_alive=False), "has died"),
    ],
)
def test_a_worker_ends_itself_when_its_engine_hangs_for_long(stats: FakeStats, words: str) -> None:
    async def main() -> None:
        slot = ModelSlot(["m"])
        engine = FakeEngine()
        engine.current = stats
        slot.fill(engine, FakeModel())
        async with asyncio.timeout(20):
            await worker_process._watch_engine(slot, 2)

    with pytest.raises(GenerationFailed, match=words):
        asyncio.run(main())
