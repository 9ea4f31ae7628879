"""Interleaved rounds: every peer takes its turn at every task, then all begin again.

Figures of one task lie minutes apart at most, so that drift of the machine meets all peers alike.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.peers.peer import NotMeasured, Peer
from benchmarks.processes import foreign_cpu
from benchmarks.tasks import Figures, Task, unit_of


@dataclass
class Series:
    """All values of one figure of one peer, a value a round."""

    task: Task
    peer: str
    figure: str
    values: list[float] = field(default_factory=list)
    foreign_cores: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def as_line(self) -> dict[str, object]:
        return {
            **self.task.as_fields(),
            "peer": self.peer,
            "figure": self.figure,
            "value": _rounded(self.median),
            "unit": unit_of(self.figure),
            "rounds": len(self.values),
            "min": _rounded(min(self.values)),
            "max": _rounded(max(self.values)),
            "foreign_cores": round(max(self.foreign_cores), 2),
        }


class Results:
    """Series in the order in which they first came."""

    def __init__(self) -> None:
        self._series: dict[tuple[Task, str, str], Series] = {}

    def __iter__(self) -> Iterator[Series]:
        return iter(self._series.values())

    def add(self, task: Task, peer: str, figures: Figures, foreign_cores: float) -> None:
        for figure, value in figures.items():
            key = (task, peer, figure)
            series = self._series.setdefault(key, Series(*key))
            series.values.append(value)
            series.foreign_cores.append(foreign_cores)


def run_rounds(
    peers: Sequence[Peer], tasks: Sequence[Task], num_rounds: int, *, one_at_a_time: bool
) -> Results:
    """`one_at_a_time`: a peer does all tasks of a round and is closed before the next one starts,
    for models of which two do not fit into memory."""
    results = Results()
    dropped: set[Peer] = set()
    try:
        for round_ in range(num_rounds):
            turns = _turns(peers, tasks, round_, one_at_a_time)
            for number, (peer, task) in enumerate(turns):
                if peer not in dropped:
                    _progress(f"round {round_ + 1}/{num_rounds} {peer.name}: {task.label}")
                    _measure(peer, task, round_, results, dropped)
                is_last_turn = number + 1 == len(turns) or turns[number + 1][0] is not peer
                if one_at_a_time and is_last_turn:
                    peer.close()
    finally:
        for peer in peers:
            peer.close()
    return results


def _turns(
    peers: Sequence[Peer], tasks: Sequence[Task], round_: int, one_at_a_time: bool
) -> list[tuple[Peer, Task]]:
    """Who does what, in order; another peer begins in each round."""
    first = round_ % len(peers)
    order = [*peers[first:], *peers[:first]]
    pairs = [(peer, task) for task in tasks for peer in order if task.mode == peer.mode]
    if one_at_a_time:
        pairs.sort(key=lambda pair: order.index(pair[0]))
    return pairs


def _measure(peer: Peer, task: Task, round_: int, results: Results, dropped: set[Peer]) -> None:
    try:
        with foreign_cpu() as foreign:
            figures = peer.measure(task, round_)
    except NotMeasured as error:
        # the others go on; a peer that failed once would fail every round
        _progress(f"left out from here on: {error}")
        dropped.add(peer)
        peer.close()
        return
    if figures is not None:
        results.add(task, peer.name, figures, foreign.cores)


def _rounded(value: float) -> float:
    return round(value, 3) if abs(value) < 1000 else round(value)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
