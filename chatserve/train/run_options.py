"""Settings of a run that are no part of the recipe: where, on what, how often it is kept."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from chatserve.settings import fields_of, setting

Recipe = TypeVar("Recipe")


@dataclass(frozen=True)
class RunOptions:
    """What `train sft` and `train reward` share beside their recipes."""

    data: str | None = setting(None, "folder that `chatserve train data` wrote", metavar="DIR")
    out: str | None = setting(
        None, "folder of the run; one that was begun with the same settings goes on", metavar="RUN"
    )
    adapter: tuple[str, ...] = setting(
        (), "adapters to merge into the base first, in their order", metavar="PATH", repeated=True
    )
    device: str = setting(
        "auto", "where to train; auto: CUDA, else Metal, else the CPU",
        choices=("auto", "cpu", "cuda", "mps"),
    )  # fmt: skip
    save_steps: int = setting(100, "steps between checkpoints", metavar="N", ge=1)
    keep_checkpoints: int = setting(2, "how many of the last ones stay", metavar="N", ge=1)
    eval_steps: int = setting(1000, "steps between evaluations; there is one at the end", ge=1)
    print_recipe: bool = setting(
        False, "print every setting of the recipe with its source, and train nothing"
    )
    revision: str = setting("main", "revision of a hub id")


def run_settings(
    kind: str, recipe: Any, options: RunOptions, *, base: str, data: str, num_processes: int
) -> dict[str, Any]:
    """What a run is begun with and must go on with: `settings.json`.

    base, data: fingerprints. Where it runs and how often it is kept are free.
    """
    return {
        "kind": kind,
        "base": base,
        "data": data,
        "num_processes": num_processes,
        "eval_steps": options.eval_steps,
        "recipe": dataclasses.asdict(recipe),
    }


def only_recipe(recipe: type[Recipe], config: Any) -> Recipe:
    """The recipe's part of a command's settings."""
    return recipe(**{item.name: getattr(config, item.name) for item in fields_of(recipe)})
