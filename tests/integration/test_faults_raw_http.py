"""Raw HTTP at the doors of worker and controller: no request is two, none is a 5xx, and whoever
breaks the framing is not listened to any further."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest

from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_worker_app
from tests.fakes import FakeEngine, FakeModel
from tests.faults.raw_http import CASES, SECOND, Case, answers, statuses, verdict_on
from tests.servers import ScriptedWorker, serving

TOKEN = "control-token"


class Doors(NamedTuple):
    worker: int
    controller: int


@pytest.fixture(scope="module")
def doors() -> Iterator[Doors]:
    registry = WorkerRegistry(time.monotonic, expiry_s=600)
    policy = AccessPolicy.build("127.0.0.1")
    with ExitStack() as stack:
        worker = stack.enter_context(
            serving(lambda: create_worker_app(FakeEngine(), FakeModel(), policy=policy))
        )
        controller = stack.enter_context(
            serving(lambda: create_controller_app(registry, control_token=TOKEN))
        )
        cards = [ModelCard(name="fake", created=1)]
        registry.register("w", worker.url, WorkerStatus(state="ready", models=cards))
        yield Doors(worker.port, controller.port)


def test_there_are_enough_cases() -> None:
    assert len(CASES) > 90 and len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_one_request_gets_one_answer(doors: Doors, case: Case) -> None:
    found = [answers(door, case.data) for door in doors]
    assert [verdict_on(case, each) for each in found] == ["ok", "ok"]
    # an answer may be lost where the connection is closed on bytes that nobody has read
    assert len({tuple(each) for each in found if each}) <= 1


def test_however_it_is_cut(doors: Doors) -> None:
    """A parser that sees it piece by piece comes to the same end."""
    for case in CASES:
        found = answers(doors.controller, case.data, piece_bytes=5)
        assert verdict_on(case, found) == "ok", case.name


def test_a_server_that_takes_both_lengths_is_found() -> None:
    """Teeth: one that believes the length and not the chunks answers what stands behind."""
    case = next(each for each in CASES if each.name == "length and chunks")
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    with ScriptedWorker([ok, ok]) as worker:
        found = answers(worker.port, case.data)
    assert "a second answer" in verdict_on(case, found)
    assert "taken" in verdict_on(case, [200])
    assert "5xx" in verdict_on(case, [500])
    fine = next(each for each in CASES if each.name == "three at once")
    assert "instead of" in verdict_on(fine, [200, 200, 200])
    assert statuses(ok + ok) == [200, 200] and SECOND.endswith(b"\r\n\r\n")
