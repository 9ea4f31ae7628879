"""What a run tells: lines, TensorBoard, W&B offline; and that no number ends it."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chatserve.errors import TrainingDiverged, UsageError
from chatserve.train.run_folder import RunFolder
from chatserve.train.training_log import TrainingLog, read_log


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_PROJECT", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def logged(run: RunFolder, start: int, *steps: int) -> None:
    log = TrainingLog(run, start, {})
    for step in steps:
        log.write(step, {"loss": 1 / step})
    log.close()


def test_a_run_that_went_on_has_the_log_of_one_that_did_not(tmp_path: Path) -> None:
    whole, broken = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    whole.begin({})
    broken.begin({})
    logged(whole, 0, 1, 2, 3, 4)
    logged(broken, 0, 1, 2, 3)
    with broken.log.open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    logged(broken, 2, 3, 4)
    assert broken.log.read_bytes() == whole.log.read_bytes()
    assert [row["step"] for row in read_log(whole.log)] == [1, 2, 3, 4]
    assert read_log(tmp_path / "none.jsonl") == []


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFolder(tmp_path / "run")
    run.begin({})
    logged(run, 0, 1, 2)
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]


@pytest.mark.parametrize("name", ["loss", "grad_norm", "eval_loss", "reward", "kl"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_number_stops_and_names_the_last_good_checkpoint(
    tmp_path: Path, name: str, value: float
) -> None:
    run = RunFolder(tmp_path / "run")
    run.begin({})
    run.write_checkpoint(3, lambda folder: None, keep=2)
    log = TrainingLog(run, 3, {})
    with pytest.raises(TrainingDiverged, match=rf"{name} is {value} at step 4.*checkpoint-3"):
        log.write(4, {name: value, "epoch": 1.0})
    log.close()
    assert read_log(run.log) == [{"step": 4, name: None, "epoch": 1.0}]


class FakeWandb:
    def __init__(self) -> None:
        self.started: dict[str, Any] = {}
        self.rows: list[Any] = []

    def init(self, **options: Any) -> Any:
        self.started = options
        return SimpleNamespace(
            log=lambda row, step: self.rows.append((step, row)), finish=lambda: None
        )


def test_wandb_only_where_configured_and_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = RunFolder(tmp_path / "run")
    run.begin({})
    logged(run, 0, 1)
    assert not wandb.started
    monkeypatch.setenv("WANDB_PROJECT", "stack")
    logged(run, 0, 1)
    assert wandb.started["mode"] == "offline" and wandb.started["project"] == "stack"
    assert wandb.rows == [(1, {"loss": 1.0})]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="wandb is not installed"):
        TrainingLog(run, 0, {})
