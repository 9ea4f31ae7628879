"""`chatserve train rl` from the command line to an adapter that the engine can serve."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from chatserve.cli.main import main
from chatserve.errors import TrainingDiverged

pytest.importorskip("trl", reason="needs the extra [train]")

from chatserve.models.adapter import load_adapter
from chatserve.models.config import ModelConfig
from chatserve.train.health import Finding, Health
from chatserve.train.ppo.session import Session
from chatserve.train.training_log import read_log
from tests import tiny
from tests.integration.rl_runs import Task, build_task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return build_task(tmp_path_factory.mktemp("rl"))


@pytest.fixture(scope="module")
def trained(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(task.command(out)) == 0
    return out


@pytest.fixture
def telltale() -> Iterator[list[str]]:
    """What a run warns of."""
    import logging

    records: list[str] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    handler = Note()
    logging.getLogger("chatserve.train").addHandler(handler)
    yield records
    logging.getLogger("chatserve.train").removeHandler(handler)


def test_a_run_leaves_a_log_and_an_adapter_to_serve(task: Task, trained: Path) -> None:
    rows = read_log(trained / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"reward", "kl", "entropy", "clip_fraction", "kl_coefficient", "rollout_kl"} <= set(
        rows[0]
    )
    assert (rows[0]["kl"], rows[0]["kl_coefficient"]) == (0.0, 0.2)
    assert rows[1]["kl"] != 0.0
    adapter = trained / "adapter"
    record = json.loads((adapter / "chatserve_training.json").read_text("utf-8"))
    assert (record["kind"], record["steps"]) == ("rl", 3)
    config = ModelConfig.from_hf(json.loads((task.base / "config.json").read_text("utf-8")))
    loaded = load_adapter(adapter, config)
    assert len(loaded.pairs) == 2 * config.num_layers
    assert all(pair.b.abs().max() > 0 for pair in loaded.pairs.values())


def test_a_run_that_has_ended_stays_as_it_is(task: Task, trained: Path) -> None:
    before = (trained / "log.jsonl").read_bytes()
    assert main(task.command(trained)) == 0
    assert (trained / "log.jsonl").read_bytes() == before


def test_other_settings_are_refused_with_the_difference(
    task: Task, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(task.command(trained, "--init-kl=0.5")) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "recipe.init_kl was 0.2 and is 0.5" in message
    assert main(task.command(trained, "--algorithm=rloo", "--num-generations=4")) == 2
    assert 'algorithm was "ppo" and is "rloo"' in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_a_reward_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    algorithm: str,
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reward, calls = Session.reward, []

    def failing(self: Session, answers: Sequence[Any]) -> list[float]:
        calls.append(len(answers))
        return [math.nan] * 4 if len(calls) == 2 else reward(self, answers)

    monkeypatch.setattr(Session, "reward", failing)
    flags = [f"--algorithm={algorithm}"] + ["--num-generations=2"] * (algorithm == "rloo")
    assert main(task.command(tmp_path / "run", *flags)) == TrainingDiverged.exit_code
    assert "checkpoint-1" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
    assert not (tmp_path / "run" / "checkpoint-2").exists()
    assert not (tmp_path / "run" / "adapter").exists()


def test_what_goes_wrong_is_warned_of_and_logged(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, telltale: list[str]
) -> None:
    finding = Finding("length-bias", "the reward follows the length; do this")
    monkeypatch.setattr(Health, "observe", lambda self, facts: [finding])
    assert main(task.command(tmp_path / "run", "--max-steps=1", "--rollout=shared")) == 0
    assert telltale == ["step 1: the reward follows the length; do this"]
    (row,) = read_log(tmp_path / "run" / "log.jsonl")
    assert row["warning_length-bias"] == 1.0
    assert row["rollout_kl"] == pytest.approx(0.0, abs=1e-5)


def test_a_reward_model_of_another_base_is_refused(
    task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_model(tmp_path / "other", seed=9)
    other = Task(tmp_path / "other", task.reward, task.data)
    assert main(other.command(tmp_path / "run")) == 3
    assert "was trained on" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min-new-tokens=8"], "--min-new-tokens 8 must be less than --max-new-tokens 8"),
        (["--max-length=8"], "raise --max-length"),
        (["--data=nowhere"], "no such folder"),
        (["--reward="], "wants --reward PATH"),
        (["--algorithm=grpo", "--num-generations=3"], "must be a multiple"),
        (["--int8=on"], "bitsandbytes"),
    ],
)
def test_what_cannot_be_used_is_told(
    task: Task,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert main(task.command(tmp_path / "run", *flags)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_every_default_names_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "rl", "--print-recipe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("init_kl = 0.2") and "PPOConfig" in line for line in lines)
    assert all("# " in line for line in lines)


def test_a_killed_run_goes_on_to_the_same_figures(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.killed_rl", str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["run"].partition("-")[0] for row in rows} == {"ppo", "rloo", "grpo"}
    assert [row for row in rows if row["codes"] != [-9, 0] or not row["is_same"]] == []
