"""What the training steps' commands share: paths, progress on stderr, the last lines."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from chatserve import environment, hub
from chatserve.errors import UsageError
from chatserve.train.recipe import recipe_lines
from chatserve.train.run_folder import RunFolder
from chatserve.train.run_options import RunOptions

LIBRARIES = ("trl", "peft", "datasets", "tensorboard")
_NUM_LINES = 20


def printed_recipe(options: RunOptions, recipe: object) -> bool:
    """Whether the recipe was all that was wanted; then it is printed."""
    if options.print_recipe:
        print("\n".join(recipe_lines(recipe)))
    return options.print_recipe


def paths(step: str, weights: str | None, options: RunOptions) -> tuple[Path, Path, RunFolder]:
    """Weights, data and run. Raises `UsageError` for those that are missing."""
    if options.data is None or options.out is None:
        raise UsageError(
            f"chatserve train {step} wants --data DIR, as `chatserve train data` wrote it, and "
            "--out RUN, a folder for checkpoints, log and adapter"
        )
    data = Path(options.data).expanduser()
    if not data.is_dir():
        raise UsageError(f"--data {data}: no such folder; make it by `chatserve train data`")
    path = hub.find_here(weights, options.revision)
    return path, data, RunFolder(Path(options.out).expanduser())


def reporter() -> Callable[[int, int, Mapping[str, float]], None]:
    """Prints some twenty lines of progress on stderr, and every evaluation."""

    def report(step: int, steps: int, values: Mapping[str, float]) -> None:
        is_evaluation = "eval_loss" in values
        if is_evaluation or step in (1, steps) or step % math.ceil(steps / _NUM_LINES) == 0:
            names = ("loss", "accuracy", "eval_loss", "eval_accuracy")
            print(f"step {step} of {steps}: {_shown(values, names)}", file=sys.stderr, flush=True)

    return report


def announce(adapter: Path, steps: int, figures: Mapping[str, float], names: Sequence[str]) -> None:
    """The adapter on stdout, what it learnt on stderr; of several processes the first does."""
    if environment.variables().get("RANK", "0") != "0":
        return
    print(f"{steps} steps: {_shown(figures, names)}", file=sys.stderr)
    print(adapter)


def _shown(values: Mapping[str, float], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {values[name]:.4g}" for name in names if name in values)
