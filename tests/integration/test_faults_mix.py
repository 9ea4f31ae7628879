"""Seconds of the random mix of faults; `tests/soak` has minutes of it."""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.faults.mix import run_mix
from tests.faults.planted import PLANTED


def seed() -> int:
    """Another one each time; FAULT_SEED repeats one."""
    return int(os.environ.get("FAULT_SEED") or random.randrange(10**6))


def test_ten_seconds_of_faults_break_no_history(tmp_path: Path) -> None:
    story = run_mix(tmp_path, seed(), seconds=9)
    assert story.violations == [], story
    assert len(story.faults) == 7 and story.calm_s is not None, story
    # neither does everything fail, nor nothing
    assert story.outcomes["done"] > 20 and story.outcomes["cancelled"] > 2, story


def test_teeth_a_token_said_twice_now_and_then_is_found(tmp_path: Path) -> None:
    # one in 500 tokens: a slow machine needs another try to say so many
    for attempt in range(5):
        story = run_mix(tmp_path, 5, seconds=2, **{PLANTED: "double"})
        if any("is not the text" in each for each in story.violations):
            return
        print(f"attempt {attempt} found nothing")
    raise AssertionError(story)
