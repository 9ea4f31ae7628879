"""Whoever has a claim on a worker is told when it is lost, and who waits for one when it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from chatserve.errors import NoWorkerAvailable, ShuttingDown
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server.leases import Lease
from chatserve.server.registry import WorkerRegistry
from tests.fakes import FakeClock


def status(*, state: Any = "ready", fingerprint: str = "fp", **progress: int) -> WorkerStatus:
    card = ModelCard(name="m", created=1, description={"fingerprint": fingerprint})
    return WorkerStatus(state=state, models=[card], **progress)


def given(
    registry: WorkerRegistry, worker_id: str, told: list[str], *, moves: bool = False
) -> Lease:
    """A request at a worker, that writes down why it was lost."""
    lease = registry.pick("m")
    assert lease.worker.worker_id == worker_id

    def note() -> None:
        assert lease.loss is not None
        told.append(f"{worker_id} {lease.loss.code}")

    lease.on_loss = note
    lease.on_sent_on = lambda: told.append(f"{worker_id} sent on")
    lease.can_move = lambda: moves
    return lease


def test_each_loses_a_worker_by_an_error_of_its_own() -> None:
    registry = WorkerRegistry(FakeClock())
    registry.register("a", "http://a", status())
    leases = [registry.pick("m") for _ in range(3)]
    registry.remove("a")
    assert len({id(lease.loss) for lease in leases} - {id(None)}) == 3
    assert len({str(lease.loss) for lease in leases}) == 1


def test_who_waits_for_a_worker_that_is_gone_is_told() -> None:
    clock = FakeClock()
    registry = WorkerRegistry(clock, expiry_s=10)
    told: list[str] = []
    registry.register("a", "http://a", status())
    lease = given(registry, "a", told)
    ended = given(registry, "a", told)
    ended.release()
    registry.remove("a")
    assert told == ["a worker_died"]
    lease.release()
    registry.register("b", "http://b", status())
    given(registry, "b", told)
    # another process listens where it listened
    registry.register("c", "http://b", status())
    assert told[1:] == ["b worker_died"]


def test_who_waits_for_a_worker_that_says_nothing_is_told_in_time() -> None:
    clock = FakeClock()
    registry = WorkerRegistry(clock, expiry_s=10, stall_s=30)
    told: list[str] = []
    assert registry.check() is None
    registry.register("a", "http://a", status())
    given(registry, "a", told)
    assert registry.check() == 10
    clock.advance(4)
    registry.heartbeat("a", status())
    assert registry.check() == 10 and told == []
    clock.advance(10.5)
    assert registry.check() is None
    assert told == ["a worker_stalled"] and registry.worker_ids() == []


def test_who_waits_for_a_worker_that_makes_no_step_is_told_in_time() -> None:
    clock = FakeClock()
    registry = WorkerRegistry(clock, expiry_s=10, stall_s=30)
    told: list[str] = []
    registry.register("a", "http://a", status())
    clock.advance(9)
    registry.heartbeat("a", status())
    given(registry, "a", told)
    for _ in range(6):
        clock.advance(4.9)
        registry.heartbeat("a", status(num_running=1, tick=7))
        assert registry.check() is not None
        assert told == []
    clock.advance(6)
    registry.heartbeat("a", status(num_running=1, tick=7))
    assert registry.check() is not None
    assert told == ["a worker_stalled"]
    with pytest.raises(NoWorkerAvailable, match="stalled"):
        registry.pick("m")


def test_a_step_is_expected_from_the_beginning_of_the_work() -> None:
    clock = FakeClock()
    registry = WorkerRegistry(clock, expiry_s=10, stall_s=2)
    told: list[str] = []
    registry.register("a", "http://a", status())
    clock.advance(5)
    given(registry, "a", told)
    assert registry.check() == 2 and told == []
    clock.advance(2.1)
    registry.check()
    assert told == ["a worker_stalled"]


def test_without_a_limit_nobody_stalls() -> None:
    clock = FakeClock()
    registry = WorkerRegistry(clock, expiry_s=10, stall_s=0)
    told: list[str] = []
    registry.register("a", "http://a", status(num_running=1))
    given(registry, "a", told)
    for _ in range(100):
        clock.advance(9)
        registry.heartbeat("a", status(num_running=1))
        assert registry.check() == 10
    assert told == [] and not registry.stalled()


@pytest.mark.parametrize("goes", ["drains", "leaves", "refuses"])
def test_who_could_move_is_told_once_somebody_else_is_there(goes: str) -> None:
    registry = WorkerRegistry(FakeClock())
    told: list[str] = []
    registry.register("a", "http://a", status())
    moving = given(registry, "a", told, moves=True)
    given(registry, "a", told)
    if goes == "drains":
        registry.heartbeat("a", status(state="draining"))
    elif goes == "leaves":
        registry.leave("a")
    else:
        registry.eject("a", is_refusing=True)
    registry.register("b", "http://b", status(fingerprint="other"))
    registry.register("c", "http://c", status(state="loading"))
    assert told == []
    registry.heartbeat("c", status())
    assert told == ["a sent on"] and moving.loss is None
    registry.remove("a")
    assert told[1:] == ["a worker_died"] * 2


def test_an_ejected_worker_goes_on_with_what_it_has() -> None:
    registry = WorkerRegistry(FakeClock())
    told: list[str] = []
    registry.register("a", "http://a", status())
    given(registry, "a", told, moves=True)
    registry.register("b", "http://b", status())
    registry.eject("a")
    assert told == []


def test_many_streams_tell_of_one_death() -> None:
    clock = FakeClock()
    registry = WorkerRegistry(clock)
    registry.register("a", "http://a", status())
    for _ in range(16):
        registry.eject("a")
    clock.advance(0.6)
    assert registry.worker_to_probe("a") is not None


def test_pick_by_fingerprint() -> None:
    registry = WorkerRegistry(FakeClock())
    for worker_id in "ab":
        registry.register(worker_id, f"http://{worker_id}", status(fingerprint=worker_id))
    for _ in range(3):
        assert registry.pick("m", fingerprint="b").worker.worker_id == "b"
        assert registry.pick("m", without={"b"}).worker.worker_id == "a"
    with pytest.raises(NoWorkerAvailable):
        registry.pick("m", fingerprint="b", without={"b"})
    with pytest.raises(NoWorkerAvailable):
        registry.pick("m", fingerprint="c")


def test_an_abort_tells_everybody() -> None:
    registry = WorkerRegistry(FakeClock())
    told: list[str] = []
    registry.register("a", "http://a", status())
    given(registry, "a", told)
    registry.leave("a")
    registry.register("b", "http://b", status())
    given(registry, "b", told)
    with registry.changes() as change:
        registry.abort(ShuttingDown("stop"))
        assert change.is_set()
    assert sorted(told) == ["a server_shutting_down", "b server_shutting_down"]
    assert registry.is_closing and registry.is_over


def test_changes_are_told() -> None:
    registry = WorkerRegistry(FakeClock())
    with registry.changes() as change:
        happenings: list[Callable[[], object]] = [
            lambda: registry.register("a", "http://a", status(state="loading")),
            lambda: registry.heartbeat("a", status()),
            lambda: registry.heartbeat("a", status(fingerprint="other")),
            lambda: registry.eject("a"),
            lambda: registry.readmit("a"),
            lambda: registry.leave("a"),
        ]
        for happens in happenings:
            change.clear()
            happens()
            assert change.is_set()
        registry.register("a", "http://a", status())
        change.clear()
        registry.heartbeat("a", status(tick=1))
        assert not change.is_set()
    registry.leave("a")
    assert not change.is_set()


def test_who_was_lost_in_a_stall_is_not_asked_again_until_it_moves() -> None:
    """What it hung over had come since its last beat, and has gone elsewhere now."""
    clock = FakeClock()
    registry = WorkerRegistry(clock, expiry_s=60, stall_s=3)
    told: list[str] = []
    registry.register("a", "http://a", status())
    lease = given(registry, "a", told)
    clock.advance(3.1)
    registry.check()
    assert told == ["a worker_stalled"]
    lease.release()
    with pytest.raises(NoWorkerAvailable):
        registry.pick("m")
    clock.advance(10)
    assert [worker.worker_id for worker in registry.stalled()] == ["a"]
    registry.heartbeat("a", status())
    clock.advance(10)
    registry.pick("m").release()
