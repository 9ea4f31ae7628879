"""A run's folder: settings that must stay, checkpoints that are whole, a disk that is full."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from chatserve.errors import CannotWrite, UsageError
from chatserve.train.run_folder import RunFolder, disk_faults, step_of

SETTINGS = {"kind": "sft", "recipe": {"lora_rank": 16, "target_modules": ("q_proj",)}}


def checkpoint(run: RunFolder, step: int, keep: int = 2) -> Path:
    return run.write_checkpoint(step, lambda at: _fill(at, str(step)), keep=keep)


def _fill(folder: Path, text: str) -> None:
    (folder / "state").write_text(text, "utf-8")


def test_a_run_goes_on_with_the_same_settings(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.begin(SETTINGS)
    run.begin(SETTINGS)
    assert run.settings() == json.loads(json.dumps(SETTINGS))


def test_other_settings_are_refused_and_shown(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.begin(SETTINGS)
    other = {"kind": "sft", "recipe": {"lora_rank": 8, "target_modules": ("q_proj",)}, "seed": 1}
    with pytest.raises(UsageError) as caught:
        run.begin(other)
    assert "recipe.lora_rank was 16 and is 8, seed was not set and is 1" in caught.value.message
    assert run.settings() == json.loads(json.dumps(SETTINGS))


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", "utf-8")
    with pytest.raises(UsageError, match=r"holds no settings\.json"):
        RunFolder(tmp_path).begin(SETTINGS)
    (tmp_path / "settings.json").write_text("{", "utf-8")
    with pytest.raises(UsageError, match="cannot be read"):
        RunFolder(tmp_path).begin(SETTINGS)


def test_checkpoints_are_numbered_and_old_ones_go(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (2, 9, 10):
        checkpoint(run, step)
    assert [step_of(each) for each in run.checkpoints()] == [9, 10]
    last = run.last_checkpoint()
    assert last is not None and (last / "state").read_text("utf-8") == "10"
    assert not [entry for entry in tmp_path.iterdir() if entry.name.endswith(".old")]


def test_half_a_checkpoint_is_none(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    checkpoint(run, 1)

    def killed(folder: Path) -> None:
        _fill(folder, "half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.write_checkpoint(2, killed, keep=2)
    assert [step_of(each) for each in run.checkpoints()] == [1]
    run.clear_writing()
    assert not run.writing.exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data.pkl"),
    ],
)
def test_a_full_disk_is_one_line(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(CannotWrite, match="free some space"), disk_faults(tmp_path):
        raise error
    with pytest.raises(ValueError, match="other"), disk_faults(tmp_path):
        raise ValueError("other")
