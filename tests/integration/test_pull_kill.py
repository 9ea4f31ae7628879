"""`kill -9` at any moment of a chain's pull: no half model, and the next pull makes it whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import published
from tests.integration.hub_stand_in import HubStandIn, serve
from tests.processes import environment

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
NUM_KILLS = 8


def test_a_killed_pull_leaves_nothing_or_the_model(tmp_path: Path) -> None:
    name = "vicuna-7b-v0"
    base, others = published.llama(tmp_path / "base"), published.vicuna(tmp_path / "hub")
    with serve(HubStandIn("org/other", {}, others)) as hub:
        result = subprocess.run(
            [sys.executable, "-m", "tests.killed_pull", name, str(base), str(NUM_KILLS)],
            cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240,
            env=environment(
                CHATSERVE_HOME=str(tmp_path / "home"), HF_HOME=str(tmp_path / "hf"),
                HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0",
            ),
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    kills = [json.loads(line) for line in result.stdout.splitlines()]
    print(kills)
    assert len(kills) == NUM_KILLS and sum(kill["killed"] for kill in kills) >= NUM_KILLS - 1
    # some died before the model had its name, some after it
    assert {kill["after"] for kill in kills} == {"absent", "whole"}
    assert all(kill["again"] == "whole" and kill["left"] == [name] for kill in kills)
