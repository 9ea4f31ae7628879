"""Alive, serving, least busy: the registry under a clock that the test moves."""

from __future__ import annotations

from typing import Any

import pytest

from chatserve.errors import ModelNotFound, NoWorkerAvailable, Overloaded, RegistrationRefused
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server.registry import WorkerRegistry
from tests.fakes import FakeClock


def status(*models: str, state: Any = "ready", **progress: Any) -> WorkerStatus:
    cards = [ModelCard(name=name, created=1) for name in models or ("m",)]
    return WorkerStatus(state=state, models=cards, **progress)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def registry(clock: FakeClock) -> WorkerRegistry:
    return WorkerRegistry(clock, expiry_s=10, stall_s=30)


def url(number: int) -> str:
    return f"http://127.0.0.1:{number}"


def picked(registry: WorkerRegistry, model: str = "m") -> str:
    with registry.pick(model) as lease:
        return lease.worker.worker_id


def test_pick_takes_the_least_busy(registry: WorkerRegistry) -> None:
    registry.register("a", url(1), status(num_running=2, num_waiting=1))
    registry.register("b", url(2), status(num_running=2))
    assert picked(registry) == "b"
    registry.heartbeat("b", status(num_running=2, num_waiting=2))
    assert picked(registry) == "a"


def test_equals_take_turns(registry: WorkerRegistry) -> None:
    registry.register("a", url(1), status())
    registry.register("b", url(2), status())
    assert [picked(registry) for _ in range(4)] == ["a", "b", "a", "b"]


def test_what_is_under_way_counts_before_the_next_heartbeat(registry: WorkerRegistry) -> None:
    registry.register("a", url(1), status())
    registry.register("b", url(2), status())
    leases = [registry.pick("m") for _ in range(6)]
    assert sorted(lease.worker.worker_id for lease in leases) == list("aaabbb")


def test_lease_is_released_once(registry: WorkerRegistry) -> None:
    registry.register("a", url(1), status())
    lease = registry.pick("m")
    assert lease.worker.num_in_flight == 1
    lease.release()
    lease.release()
    assert lease.worker.num_in_flight == 0
    with pytest.raises(KeyError), registry.pick("m"):
        raise KeyError
    assert lease.worker.num_in_flight == 0


def test_lease_survives_a_registration_anew(registry: WorkerRegistry) -> None:
    registry.register("a", url(1), status())
    lease = registry.pick("m")
    registry.register("a", url(1), status())
    with registry.pick("m") as other:
        assert other.worker.num_in_flight == 2
        lease.release()
        assert other.worker.num_in_flight == 1


def test_unknown_model_lists_what_there_is(registry: WorkerRegistry) -> None:
    with pytest.raises(ModelNotFound, match="none yet"):
        registry.pick("m")
    registry.register("a", url(1), status("m1", "m2"))
    with pytest.raises(ModelNotFound, match="m1, m2") as caught:
        registry.pick("m3")
    assert caught.value.param == "model"


def test_only_workers_of_the_model_are_picked(registry: WorkerRegistry) -> None:
    registry.register("a", url(1), status("m1", "alias"))
    registry.register("b", url(2), status("m2"))
    assert [picked(registry, name) for name in ("m1", "m2", "alias")] == ["a", "b", "a"]


@pytest.mark.parametrize("state", ["loading", "draining"])
def test_worker_that_is_not_ready(registry: WorkerRegistry, state: str) -> None:
    registry.register("a", url(1), status())
    registry.heartbeat("a", status(state=state))
    with pytest.raises(NoWorkerAvailable, match=state):
        registry.pick("m")


def test_expected_model_is_known_before_any_worker(clock: FakeClock) -> None:
    registry = WorkerRegistry(clock, expected=["m"])
    with pytest.raises(NoWorkerAvailable, match="gone"):
        registry.pick("m")


def test_silence_is_the_end(registry: WorkerRegistry, clock: FakeClock) -> None:
    registry.register("a", url(1), status())
    clock.advance(9)
    assert registry.heartbeat("a", status())
    clock.advance(10)
    assert picked(registry) == "a"
    clock.advance(0.1)
    with pytest.raises(NoWorkerAvailable):
        registry.pick("m")
    assert not registry.heartbeat("a", status())
    assert [card.name for card in registry.cards()] == ["m"]


def test_dead_worker_is_removed_and_its_model_stays_known(registry: WorkerRegistry) -> None:
    registry.register("a", url(1), status())
    registry.remove("a")
    registry.remove("a")
    with pytest.raises(NoWorkerAvailable):
        registry.pick("m")


def test_who_leaves_takes_its_models_along(registry: WorkerRegistry) -> None:
    registry.register("a", url(1), status("m", "only-a"))
    registry.register("b", url(2), status("m"))
    registry.leave("a")
    registry.leave("a")
    assert [card.name for card in registry.cards()] == ["m"]
    with pytest.raises(ModelNotFound):
        registry.pick("only-a")


def test_an_expected_model_is_not_forgotten(clock: FakeClock) -> None:
    registry = WorkerRegistry(clock, expected=["m"])
    registry.register("a", url(1), status())
    registry.leave("a")
    assert [card.name for card in registry.cards()] == ["m"]


def test_model_is_listed_once_it_has_been_ready(registry: WorkerRegistry) -> None:
    registry.register("a", url(1), status(state="loading"))
    assert registry.cards() == []
    registry.heartbeat("a", status())
    assert [card.name for card in registry.cards()] == ["m"]


def test_id_of_a_live_worker_cannot_be_taken(registry: WorkerRegistry, clock: FakeClock) -> None:
    registry.register("a", url(1), status())
    with pytest.raises(RegistrationRefused, match=url(1)):
        registry.register("a", url(2), status())
    clock.advance(11)
    registry.register("a", url(2), status())
    assert registry.pick("m").worker.base_url == url(2)


def test_new_worker_on_an_address_replaces_the_old(registry: WorkerRegistry) -> None:
    registry.register("a", url(1), status())
    registry.register("b", url(1), status())
    assert not registry.heartbeat("a", status())
    assert {picked(registry) for _ in range(3)} == {"b"}


def test_ejected_worker_gets_nothing_until_it_is_readmitted(
    registry: WorkerRegistry, clock: FakeClock
) -> None:
    registry.register("a", url(1), status())
    assert registry.worker_to_probe("a") is None
    registry.eject("a")
    registry.heartbeat("a", status())
    with pytest.raises(NoWorkerAvailable, match="unreachable"):
        registry.pick("m")
    assert registry.worker_to_probe("a") is None
    clock.advance(0.5)
    probed = registry.worker_to_probe("a")
    assert probed is not None and probed.worker_id == "a"
    registry.readmit("a")
    assert registry.worker_to_probe("a") is None
    assert picked(registry) == "a"


def test_ejection_grows_and_is_forgiven(registry: WorkerRegistry, clock: FakeClock) -> None:
    registry.register("a", url(1), status())

    def pause_s() -> float:
        start = clock.now
        registry.eject("a")
        while registry.worker_to_probe("a") is None:
            clock.advance(0.5)
            registry.heartbeat("a", status())
        return clock.now - start

    assert [pause_s() for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    for _ in range(20):
        clock.advance(10)
        registry.heartbeat("a", status())
    assert pause_s() == 0.5


def test_unknown_worker_is_no_trouble(registry: WorkerRegistry) -> None:
    registry.eject("x")
    registry.readmit("x")
    assert registry.worker_to_probe("x") is None


def test_worker_that_has_work_and_does_not_move_is_stalled(
    registry: WorkerRegistry, clock: FakeClock
) -> None:
    registry.register("a", url(1), status())

    def beat(seconds: int, **progress: Any) -> None:
        for _ in range(seconds // 5):
            clock.advance(5)
            registry.heartbeat("a", status(**progress))

    beat(100, tick=7)
    assert registry.stalled() == []  # idle
    for tick in range(8, 20):
        beat(10, tick=tick, num_running=1)
    assert registry.stalled() == []  # busy
    beat(25, tick=19, num_running=1)  # 30 s since tick 19 was first heard of
    assert registry.stalled() == []
    beat(5, tick=19, num_running=1)
    assert [worker.worker_id for worker in registry.stalled()] == ["a"]
    with pytest.raises(NoWorkerAvailable, match="stalled"):
        registry.pick("m")
    beat(5, tick=20, num_running=1)
    assert picked(registry) == "a"


def test_models_are_listed_in_the_order_they_were_named(clock: FakeClock) -> None:
    registry = WorkerRegistry(clock, expected=["m", "n"])
    registry.register("a", url(1), status("extra"))
    registry.register("b", url(2), status("n"))
    assert [card.name for card in registry.cards()] == ["n", "extra"]
    registry.register("c", url(3), status("m"))
    assert [card.name for card in registry.cards()] == ["m", "n", "extra"]


def test_readiness_of_expected_models(clock: FakeClock) -> None:
    registry = WorkerRegistry(clock, expected=["m", "n"])
    assert [(r.name, r.state) for r in registry.readiness()] == [
        ("m", "starting"),
        ("n", "starting"),
    ]
    registry.register("a", url(1), status(state="loading", loaded_bytes=3, total_bytes=9))
    first = registry.readiness()[0]
    assert (first.state, first.loaded_bytes, first.total_bytes) == ("loading", 3, 9)
    registry.heartbeat("a", status())
    assert not registry.is_ready()
    registry.register("b", url(2), status("n", "extra"))
    assert registry.is_ready()
    assert [r.name for r in registry.readiness()] == ["m", "n", "extra"]
    clock.advance(11)
    assert not registry.is_ready()


def test_best_worker_speaks_for_the_model(registry: WorkerRegistry) -> None:
    registry.register("a", url(1), status())
    registry.register("b", url(2), status(state="loading"))
    assert [r.state for r in registry.readiness()] == ["ready"]


def test_without_expectations_one_ready_model_is_enough(registry: WorkerRegistry) -> None:
    assert not registry.is_ready()
    registry.register("a", url(1), status(state="loading"))
    assert not registry.is_ready()
    registry.register("b", url(2), status("n"))
    assert registry.is_ready()


def test_changes_are_told(registry: WorkerRegistry, clock: FakeClock) -> None:
    changes: list[int] = []
    registry.on_change = lambda: changes.append(1)

    def num_told() -> int:
        count = len(changes)
        changes.clear()
        return count

    registry.register("a", url(1), status(state="loading"))
    assert num_told() == 1
    registry.heartbeat("a", status(state="loading", tick=1))
    assert num_told() == 0
    registry.heartbeat("a", status())
    assert num_told() == 1
    registry.eject("a")
    registry.readmit("a")
    registry.remove("a")
    assert num_told() == 3
    registry.register("b", url(2), status())
    clock.advance(11)
    registry.readiness()
    assert num_told() == 2


def full(num_places: int, wait_s: float = 0.0, **fields: Any) -> WorkerStatus:
    return status(num_places=num_places, wait_s=wait_s, **fields)


def test_who_was_given_all_it_takes_is_picked_last(registry: WorkerRegistry) -> None:
    registry.register("a", url(1), full(2, num_running=9))
    registry.register("b", url(2), full(1))
    leases = [registry.pick("m") for _ in range(3)]
    assert [lease.worker.worker_id for lease in leases] == ["b", "a", "a"]


def test_all_are_full_only_when_none_has_room(registry: WorkerRegistry) -> None:
    registry.check_room()
    registry.register("a", url(1), full(1, 7.2))
    registry.register("b", url(2), full(1, 3.2))
    leases = [registry.pick("m")]
    registry.check_room("m")
    leases.append(registry.pick("m"))
    for model in ("m", None):
        with pytest.raises(Overloaded, match="2 requests are under way") as caught:
            registry.check_room(model)
        assert caught.value.retry_after_s == 4
    leases[0].release()
    registry.check_room("m")


def test_a_worker_that_does_not_say_what_it_takes_is_never_full(registry: WorkerRegistry) -> None:
    registry.register("a", url(1), full(0))
    leases = [registry.pick("m") for _ in range(500)]
    registry.check_room("m")
    assert len(leases) == 500


@pytest.mark.parametrize(("wait_s", "retry_after_s"), [(0.0, 1), (1e6, 60)])
def test_when_to_come_back_has_bounds(
    registry: WorkerRegistry, wait_s: float, retry_after_s: int
) -> None:
    registry.register("a", url(1), full(1, wait_s))
    lease = registry.pick("m")
    with pytest.raises(Overloaded) as caught:
        registry.check_room()
    assert caught.value.retry_after_s == retry_after_s
    lease.release()
