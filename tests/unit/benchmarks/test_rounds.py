"""Turns are interleaved, a peer that fails is left out, everything started is closed."""

from __future__ import annotations

import pytest

from benchmarks.peers.peer import NotMeasured
from benchmarks.rounds import run_rounds
from benchmarks.tasks import Figures, Task

TASKS = [Task("in-process", "prefill", 16), Task("in-process", "decode", 8, 2, 4)]
Turns = list[tuple[str, str, int]]


class FakePeer:
    """Writes its turns into a log that all peers share."""

    mode = "in-process"

    def __init__(self, name: str, turns: Turns, fails_in: int | None = None) -> None:
        self.name = name
        self._turns = turns
        self._fails_in = fails_in
        self.closed = 0

    def measure(self, task: Task, round_: int) -> Figures | None:
        self._turns.append((self.name, task.what, round_))
        if round_ == self._fails_in:
            raise NotMeasured("no reason")
        return {"tokens_per_s": float(round_)}

    def close(self) -> None:
        self.closed += 1


def test_peers_take_turns_at_every_task() -> None:
    turns: Turns = []
    peers = [FakePeer("a", turns), FakePeer("b", turns)]
    results = run_rounds(peers, TASKS, 2, one_at_a_time=False)
    assert turns == [
        ("a", "prefill", 0), ("b", "prefill", 0), ("a", "decode", 0), ("b", "decode", 0),
        ("b", "prefill", 1), ("a", "prefill", 1), ("b", "decode", 1), ("a", "decode", 1),
    ]  # fmt: skip
    assert [series.values for series in results] == [[0.0, 1.0]] * 4
    line = next(iter(results)).as_line()
    assert (line["value"], line["min"], line["max"], line["rounds"]) == (0.5, 0.0, 1.0, 2)
    assert line["unit"] == "tokens/s"


def test_one_at_a_time_ends_a_peer_before_the_next_begins() -> None:
    turns: Turns = []
    peers = [FakePeer("a", turns), FakePeer("b", turns)]
    run_rounds(peers, TASKS, 1, one_at_a_time=True)
    assert [name for name, _, _ in turns] == ["a", "a", "b", "b"]
    assert [peer.closed for peer in peers] == [2, 2]


def test_a_peer_that_fails_is_left_out_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    turns: Turns = []
    peers = [FakePeer("a", turns, fails_in=0), FakePeer("b", turns)]
    results = run_rounds(peers, TASKS, 2, one_at_a_time=False)
    assert [name for name, _, _ in turns] == ["a", "b", "b", "b", "b"]
    assert {series.peer for series in results} == {"b"}
    assert "left out from here on: no reason" in capsys.readouterr().err


def test_peers_are_closed_when_a_run_is_interrupted() -> None:
    class Interrupted(FakePeer):
        def measure(self, task: Task, round_: int) -> Figures | None:
            raise KeyboardInterrupt

    peers = [Interrupted("a", []), FakePeer("b", [])]
    with pytest.raises(KeyboardInterrupt):
        run_rounds(peers, TASKS, 1, one_at_a_time=False)
    assert [peer.closed for peer in peers] == [1, 1]
