"""What a run tells step by step: `TrainingLog` writes log.jsonl, TensorBoard, and W&B if asked.

Weights & Biases is used where `WANDB_PROJECT` is set, and stays offline unless `WANDB_MODE` says
otherwise. A number that is none ends the run before a checkpoint could keep it.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chatserve import environment
from chatserve.errors import TrainingDiverged, UsageError
from chatserve.train.run_folder import LOG, TENSORBOARD, RunFolder, disk_faults

_MUST_BE_FINITE = ("loss", "grad_norm", "eval_loss", "reward", "kl")


class TrainingLog:
    """The log of one run from `step` on: what a killed run has logged beyond it is taken back.

    So the log of a run with interruptions reads as one without. Used by one process of a run.
    """

    def __init__(self, run: RunFolder, step: int, settings: Mapping[str, Any]) -> None:
        """Raises `CannotWrite`; `UsageError` where W&B is configured and not installed."""
        from torch.utils.tensorboard import SummaryWriter

        self._run = run
        self._wandb = _wandb(run, settings)
        with disk_faults(run.path):
            _keep(run.path / LOG, step)
            self._file = (run.path / LOG).open("a", encoding="utf-8")
            folder = str(run.path / TENSORBOARD)
            self._board = SummaryWriter(
                folder, purge_step=step + 1 if step else None, flush_secs=10
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of `values` after `step`.

        Raises `TrainingDiverged` for a loss, gradient, reward or KL that is no number, which is
        logged as null first; `CannotWrite`.
        """
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with disk_faults(self._run.path):
            self._file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(row), step=step)
        check_finite(self._run, step, values)

    def close(self) -> None:
        with disk_faults(self._run.path):
            self._file.close()
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_finite(run: RunFolder, step: int, values: Mapping[str, float]) -> None:
    """Raise `TrainingDiverged` where a number that training lives by is none."""
    for name in _MUST_BE_FINITE:
        value = values.get(name)
        if value is None or math.isfinite(value):
            continue
        kept = run.last_checkpoint()
        where = f"the last good checkpoint is {kept}" if kept else "no checkpoint was made before"
        raise TrainingDiverged(
            f"{name} is {value} at step {step}: the training has diverged and stops; {where}; "
            "lower --learning-rate or --bf16 off, and start in another --out"
        )


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.jsonl; a last line that a kill has cut off is left out."""
    return list(_rows(path))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return
    for line in lines:
        if line.endswith("\n"):
            yield json.loads(line)


def _keep(path: Path, step: int) -> None:
    """Cut the log back to what belongs to steps up to `step`."""
    if not path.exists():
        return
    kept = [row for row in _rows(path) if row["step"] <= step]
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with open(handle, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(name, 0o644)
    os.replace(name, path)


def _wandb(run: RunFolder, settings: Mapping[str, Any]) -> Any:
    """W&B's run where it is configured, else None."""
    variables = environment.variables()
    project = variables.get("WANDB_PROJECT")
    if not project or variables.get("WANDB_MODE") == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        raise UsageError(
            "WANDB_PROJECT is set and wandb is not installed; pip install wandb, or unset it"
        ) from None
    return wandb.init(
        project=project, dir=str(run.path), config=dict(settings), name=run.path.name,
        mode=variables.get("WANDB_MODE", "offline"),
    )  # fmt: skip
