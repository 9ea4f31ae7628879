"""`chatserve train reward WEIGHTS --data DIR --out RUN`: the reward model."""

from __future__ import annotations

from dataclasses import dataclass

from chatserve import config
from chatserve.cli.commands.train_run import LIBRARIES, announce, paths, printed_recipe, reporter
from chatserve.flags import CommandParser
from chatserve.train.recipe import RewardRecipe
from chatserve.train.run_options import RunOptions, only_recipe


@dataclass(frozen=True)
class RewardTrainingConfig(RewardRecipe, RunOptions):
    """Settings of `chatserve train reward`."""


def main(argv: list[str]) -> int:
    """Train, print the adapter's folder. Raises `StartupError`."""
    parser = CommandParser(
        "chatserve train reward",
        "Teach a model which of two answers people prefer: a LoRA adapter and a score head on the "
        "pairs of DIR/reward, its accuracy measured on those of DIR/evaluation. The defaults are "
        "the published recipe of StackLLaMA; the source of each stands behind it.",
        RewardTrainingConfig,
    )
    parser.add_argument("weights", nargs="?", help="a folder, .gguf file, or a model's name")
    flags = parser.flags(argv)
    weights = flags.pop("weights", None)
    options = config.build(RewardTrainingConfig, flags)
    recipe = only_recipe(RewardRecipe, options)
    if printed_recipe(options, recipe):
        return 0
    path, data, run = paths("reward", weights, options)

    from chatserve.cli.commands.train import need

    need(*LIBRARIES)
    from chatserve.train.reward import train_reward

    outcome = train_reward(path, data, run, recipe, options, reporter())
    announce(
        outcome.adapter, outcome.steps, outcome.figures, ("loss", "eval_loss", "eval_accuracy")
    )
    return 0
