"""Runs of `train rl` that are killed at given places, each in a fork, and go on afterwards.

    python -m tests.killed_rl FOLDER

Prints a JSON line per run: its name, and whether log and adapter are those of an undisturbed run.
The forks share what is imported, and nothing that has been computed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import accelerate  # noqa: F401  (imported once, for all forks)
import datasets  # noqa: F401
import peft  # noqa: F401
import pyarrow.parquet  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from chatserve.cli.commands import train_rl
from chatserve.train import adapter_folder
from chatserve.train.ppo import online, training  # noqa: F401
from chatserve.train.run_folder import RunFolder
from chatserve.train.training_log import TrainingLog
from tests.integration.rl_runs import Task, build_task

OTHERS = ["--num-generations=2", "--beta=0.1"]
PLACES = {
    "ppo": ["after-log-1", "in-checkpoint-1", "after-checkpoint-2", "in-adapter"],
    "rloo": ["in-checkpoint-2"],
    "grpo": ["in-checkpoint-2"],
}  # fmt: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def mine(place: str) -> None:
    """Let this process die at `place`."""
    write, put, fix = TrainingLog.write, RunFolder.place_checkpoint, adapter_folder.write_peft
    when, _, step = place.rpartition("-")

    def log(self: TrainingLog, number: int, *others: object) -> None:
        if (when, step) == ("before-log", str(number)):
            die()
        write(self, number, *others)  # type: ignore[arg-type]
        if (when, step) == ("after-log", str(number)):
            die()

    def checkpoint(self: RunFolder, written: Path, number: int, **options: int) -> Path:
        if (when, step) == ("in-checkpoint", str(number)):
            die()  # written aside, without its name
        found = put(self, written, number, **options)
        if (when, step) == ("after-checkpoint", str(number)):
            die()
        return found

    def adapter(*given: object) -> None:
        fix(*given)  # type: ignore[arg-type]
        if place == "in-adapter" and (Path(str(given[1])).parent.parent / "checkpoint-3").exists():
            die()

    TrainingLog.write = log  # type: ignore[method-assign]
    RunFolder.place_checkpoint = checkpoint  # type: ignore[method-assign]
    adapter_folder.write_peft = adapter


def in_fork(work: Callable[[], object]) -> int:
    """The exit code of `work` in a process of its own; minus the signal that ended it."""
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def results(out: Path) -> tuple[bytes, ...]:
    files = (out / "log.jsonl", out / "adapter" / "adapter_model.safetensors")
    return tuple(file.read_bytes() for file in files)


def main(folder: Path) -> None:
    assert in_fork(lambda: build_task(folder)) == 0
    task = Task(folder / "base", folder / "reward" / "adapter", folder / "data")
    for algorithm, places in PLACES.items():
        flags = [f"--algorithm={algorithm}", *(OTHERS if algorithm != "ppo" else [])]
        out = folder / algorithm

        def train(out: Path, place: str = "", flags: list[str] = flags) -> None:
            if place:
                mine(place)
            assert train_rl.main(task.command(out, *flags)[2:]) == 0

        assert in_fork(lambda: train(out)) == 0  # noqa: B023  (called at once)
        expected = results(out)
        for place in places:
            out = folder / f"{algorithm}-{place}"
            codes = [in_fork(lambda: train(out, place)), in_fork(lambda: train(out))]  # noqa: B023
            is_same = results(out) == expected
            print(json.dumps({"run": out.name, "codes": codes, "is_same": is_same}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
