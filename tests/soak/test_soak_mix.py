"""Ten minutes of faults, with resumption and without; and the bugs that they have to find."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.mix import run_mix
from tests.faults.planted import PLANTED
from tests.integration.test_faults_mix import seed

pytestmark = pytest.mark.soak


@pytest.mark.timeout(900)
@pytest.mark.parametrize("flag", ["--resume", "--no-resume"])
def test_minutes_of_faults_break_no_history(tmp_path: Path, flag: str) -> None:
    story = run_mix(tmp_path, seed(), seconds=300, flags=(flag,))
    assert story.violations == [], story
    assert story.calm_s is not None and story.outcomes["done"] > 1000, story


@pytest.mark.parametrize(
    ("bug", "said"), [("cut", "without a word"), ("keep slots", "not calm after")]
)
def test_teeth_planted_bugs_are_found(tmp_path: Path, bug: str, said: str) -> None:
    story = run_mix(
        tmp_path, 7, seconds=20, flags=("--no-resume",), calm_s=10, **{PLANTED: bug}
    )  # fmt: skip
    assert any(said in each for each in story.violations), story
