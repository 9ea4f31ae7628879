"""Slow machines take smaller steps: none may look like a hang."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from chatserve.config import WorkerConfig
from chatserve.engine import serving
from chatserve.engine.sequence import SamplingParams
from chatserve.engine.serving import load
from chatserve.engine.step_size import fit_steps
from tests import tiny
from tests.unit.engine.scripted import scripted_engine


class Slow:
    """Takes `step_s` for a step and `each_s` for each of its tokens, by a clock of its own."""

    def __init__(self, step_s: float, each_s: float) -> None:
        self.step_s, self.each_s = step_s, each_s
        self.now = 0.0
        self.tried: list[int] = []
        self.limits: list[int] = []

    def read(self, token_ids: Sequence[int]) -> torch.Tensor:
        self.tried.append(len(token_ids))
        self.now += self.step_s + self.each_s * len(token_ids)
        return torch.zeros(len(token_ids), 1)

    def limit_steps(self, num_tokens: int) -> None:
        self.limits.append(num_tokens)


@pytest.mark.parametrize(
    ("step_s", "each_s", "limits"),
    [
        (0.01, 0.001, []),  # 0.5 s for 512
        (0.1, 0.01, []),  # 5 s
        (0.1, 0.1, [73]),  # 51 s: a laptop with 7B
        (1.0, 1.0, [5]),
        (20.0, 0.01, []),  # from a disk, whatever their number
        (20.0, 0.5, [41]),  # no more than twice as long as with one
    ],
)
def test_a_step_takes_a_quarter_of_the_gap(step_s: float, each_s: float, limits: list[int]) -> None:
    slow = Slow(step_s, each_s)
    fit_steps(slow, 512, 30.0, clock=lambda: slow.now)
    assert slow.limits == limits


def test_a_fast_machine_tries_one_token_and_no_limit_none() -> None:
    fast, slow = Slow(0.001, 0.001), Slow(9.0, 9.0)
    fit_steps(fast, 512, 30.0, clock=lambda: fast.now)
    fit_steps(slow, 512, 0.0, clock=lambda: slow.now)
    assert (fast.tried, slow.tried, slow.limits) == ([1], [], [])


def test_steps_that_cannot_be_shorter_are_told_with_the_way_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow = Slow(20.0, 0.0)
    fit_steps(slow, 512, 30.0, clock=lambda: slow.now)
    assert "--token-gap-timeout-s=80" in caplog.text


def test_an_engine_takes_smaller_steps_and_says_the_same() -> None:
    texts, num_steps = [], []
    for limit in (512, 1):
        engine, _ = scripted_engine("hello", max_num_seqs=4)
        engine.limit_steps(limit)
        engine.add("a", list(range(40)), SamplingParams(temperature=0, max_tokens=3))
        steps = []
        while engine.has_work:
            steps.append(engine.step())
        texts.append("".join(event.text for events in steps for event in events))
        num_steps.append(len(steps))
    assert texts[0] == texts[1]
    # 2 x 4 tokens at a time
    assert num_steps == [3, 7]


def test_a_model_is_tried_before_it_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_model(tmp_path / "tiny")
    tried: list[tuple[int, float]] = []
    monkeypatch.setattr(
        serving, "fit_steps", lambda _engine, most, gap_s: tried.append((most, gap_s))
    )
    load(WorkerConfig(weights=str(tmp_path / "tiny"), device="cpu", dtype="float32"))
    assert tried == [(512, 30.0)]
