"""`chatserve train sft WEIGHTS --data DIR --out RUN`: supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from chatserve import config
from chatserve.cli.commands.train_run import LIBRARIES, announce, paths, printed_recipe, reporter
from chatserve.flags import CommandParser
from chatserve.train.recipe import SftRecipe
from chatserve.train.run_options import RunOptions, only_recipe


@dataclass(frozen=True)
class SftConfig(SftRecipe, RunOptions):
    """Settings of `chatserve train sft`."""


def main(argv: list[str]) -> int:
    """Train, print the adapter's folder. Raises `StartupError`."""
    parser = CommandParser(
        "chatserve train sft",
        "Teach a model to answer questions: a LoRA adapter on the pairs of DIR/finetune. The "
        "defaults are the published recipe of StackLLaMA; the source of each stands behind it.",
        SftConfig,
    )
    parser.add_argument("weights", nargs="?", help="a folder, .gguf file, or a model's name")
    flags = parser.flags(argv)
    weights = flags.pop("weights", None)
    options = config.build(SftConfig, flags)
    recipe = only_recipe(SftRecipe, options)
    if printed_recipe(options, recipe):
        return 0
    path, data, run = paths("sft", weights, options)

    from chatserve.cli.commands.train import need

    need(*LIBRARIES)
    from chatserve.train.supervised import train_sft

    outcome = train_sft(path, data, run, recipe, options, reporter())
    announce(outcome.adapter, outcome.steps, outcome.figures, ("loss", "eval_loss"))
    return 0
