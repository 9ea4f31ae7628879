"""A training that is killed again and again: `python -m tests.killed_trainings KIND FOLDER KILLS…`.

Each KILL is PLACE:STEP. The run in FOLDER/killed goes on after each one and to the end after the
last; FOLDER/whole is never killed. Processes are forked from one that has imported everything.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from chatserve.train import adapter_folder, durable, training_log
from chatserve.train.recipe import RewardRecipe, SftRecipe
from chatserve.train.reward import train_reward
from chatserve.train.run_folder import RunFolder, step_of
from chatserve.train.run_options import RunOptions
from chatserve.train.supervised import train_sft

SETTINGS: dict[str, Any] = {
    "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-2, "max_steps": 4,
    "max_length": 64, "warmup_steps": 1,
}  # fmt: skip
OPTIONS = RunOptions(device="cpu", save_steps=2, eval_steps=3)


def train(kind: str, folder: Path, run: Path) -> None:
    places = (folder / "base", folder / "data", RunFolder(run))
    if kind == "sft":
        train_sft(*places, SftRecipe(**SETTINGS), OPTIONS, lambda *told: None)
    else:
        train_reward(*places, RewardRecipe(**SETTINGS), OPTIONS, lambda *told: None)


def die(*ignored: Any, **others: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str, step: int) -> None:
    """Let this process die at `place` of `step`: what is there runs, or half of it, and no more."""
    if place == "log":
        write = training_log.TrainingLog.write

        def log(self: Any, at: int, values: Any) -> None:
            write(self, at, values)
            if at == step:
                die()

        training_log.TrainingLog.write = log  # type: ignore[method-assign]
    elif place == "checkpoint":  # its adapter is written, optimiser and states are not

        def peft(model: Any, folder: Path, name: str = "default") -> None:
            adapter_folder.write_peft(model, folder, name)
            if f"checkpoint-{step}" in str(folder):
                die()

        durable.write_peft = peft
    elif place == "renamed":
        place_checkpoint = RunFolder.place_checkpoint

        def placed(self: Any, written: Path, at: int, *, keep: int) -> Path:
            target = place_checkpoint(self, written, at, keep=keep)
            if step_of(target) == step:
                die()
            return target

        RunFolder.place_checkpoint = placed  # type: ignore[method-assign]
    else:
        assert place == "adapter"
        adapter_folder.place_folder = die


def forked(kind: str, folder: Path, run: Path, kill: str | None) -> int:
    """Train in a process of its own. Returns the signal that ended it, 0 for none."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        if kill:
            place, _, step = kill.partition(":")
            arm(place, int(step))
        try:
            train(kind, folder, run)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def main(kind: str, folder: Path, kills: Sequence[str]) -> None:
    for kill in kills:
        assert forked(kind, folder, folder / "killed", kill) == signal.SIGKILL, kill
    assert forked(kind, folder, folder / "killed", None) == 0
    assert forked(kind, folder, folder / "whole", None) == 0


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
