"""`kill -9` at any moment of apply-delta: the target is absent, old or new, never half."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deltas import VOCAB, base_tensors, delta_tensors, write_folder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
NUM_KILLS = 30


def run(folder: Path, mode: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    write_folder(folder / "base", base_tensors())
    write_folder(folder / "first", delta_tensors(1, vocab=VOCAB + 1), form="bin-shards")
    write_folder(folder / "second", delta_tensors(2))
    result = subprocess.run(
        [sys.executable, "-m", "tests.killed_apply", str(folder), str(NUM_KILLS), mode],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    *kills, last = map(json.loads, result.stdout.splitlines())
    print(kills)
    assert len(kills) == NUM_KILLS and all(kill["killed"] for kill in kills)
    return kills, last


@pytest.mark.parametrize("mode", ["replace", "fresh"])
def test_a_killed_run_leaves_the_old_or_the_new(mode: str, tmp_path: Path) -> None:
    kills, last = run(tmp_path, mode)
    old = "absent" if mode == "fresh" else "first"
    assert {kill["before"] for kill in kills} == {old}
    # some died before the new name was given, some after it
    assert {kill["after"] for kill in kills} == {old, "second"}
    assert last == {"last": "first", "left": ["base", "first", "second", "target"]}


def test_the_kills_hit_where_it_hurts(tmp_path: Path) -> None:
    """Without the exchange of names the same kills find a target that is half or gone."""
    kills, _ = run(tmp_path, "two-steps")
    assert {kill["after"] for kill in kills} & {"half", "absent"}
