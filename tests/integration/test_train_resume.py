"""A training that is killed at any step goes on to the same log and the same adapter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chatserve.train.training_log import read_log
from tests import trainings

ROOT = Path(__file__).parents[2]
KILLS = {
    "sft": ["log:1", "log:2", "checkpoint:2", "log:3", "checkpoint:4", "adapter:4"],
    "reward": ["log:1", "renamed:2", "log:3", "renamed:4"],
}


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_kill_minus_9_changes_nothing(kind: str, tmp_path: Path) -> None:
    trainings.save_base(tmp_path / "base")
    trainings.save_data(tmp_path / "data")
    command = [sys.executable, "-m", "tests.killed_trainings", kind, str(tmp_path), *KILLS[kind]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    rows = read_log(whole / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 4]
    for name in ("log.jsonl", "settings.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    for path in sorted((whole / "adapter").iterdir()):
        assert (killed / "adapter" / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(each.name for each in killed.iterdir()) == sorted(
        each.name for each in whole.iterdir()
    )
