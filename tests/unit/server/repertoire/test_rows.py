"""What is told of models, and of whose worker nobody knows any more."""

from __future__ import annotations

from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server.registry import WorkerRegistry
from chatserve.server.repertoire.rows import ModelRows, as_seen_by
from tests.fakes import FakeClock


def test_a_model_is_told_of_when_the_worker_that_brought_it_is_gone() -> None:
    clock = FakeClock()
    registry = WorkerRegistry(clock, expiry_s=10)
    status = WorkerStatus(state="ready", models=[ModelCard(name="llama", created=1)])
    registry.register("w", "http://w", status)
    rows = ModelRows(registry, None)
    assert [(row["name"], row["state"]) for row in rows.rows(0.0)] == [("llama", "ready")]
    clock.advance(11)
    assert [(row["name"], row["state"]) for row in rows.rows(0.0)] == [("llama", "starting")]
    assert [card["id"] for card in rows.cards()] == ["llama"]


def test_the_words_of_a_failed_worker_tell_only_operators_where_files_lie() -> None:
    row = {
        "name": "llama", "weights": "/home/me/llama",
        "error": {"message": "/home/me/llama needs 13.5 GB", "exit_code": 4},
    }  # fmt: skip
    assert as_seen_by(row, is_operator=True) == row
    assert as_seen_by(row, is_operator=False) == {
        "name": "llama", "weights": None,
        "error": {"message": "llama needs 13.5 GB", "exit_code": 4},
    }  # fmt: skip
    well = {"name": "llama", "weights": "/home/me/llama", "error": None}
    assert as_seen_by(well, is_operator=False) == {**well, "weights": None}
