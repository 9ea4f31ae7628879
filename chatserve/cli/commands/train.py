"""`chatserve train STEP …`: the steps of the StackLLaMA recipe, each a module of its own.

Imports a step only when it runs; none of the libraries that training needs.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

from chatserve.errors import UsageError
from chatserve.flags import CommandParser


@dataclass(frozen=True)
class TrainStep:
    """One row of the table: the module has `main(argv) -> int`."""

    module: str
    does: str


STEPS: dict[str, TrainStep] = {
    "data": TrainStep("chatserve.cli.commands.train_data", "questions with votes, as tables"),
    "sft": TrainStep("chatserve.cli.commands.train_sft", "supervised fine-tuning"),
    "reward": TrainStep("chatserve.cli.commands.train_reward", "the reward model"),
    "rl": TrainStep("chatserve.cli.commands.train_rl", "reinforcement learning against it"),
}


@dataclass(frozen=True)
class TrainConfig:
    """`chatserve train` alone has no settings; its steps have."""


def main(argv: list[str]) -> int:
    """Run one step. Raises `StartupError`."""
    if argv and argv[0] in STEPS:
        code = importlib.import_module(STEPS[argv[0]].module).main(argv[1:])
        assert isinstance(code, int)
        return code
    parser = CommandParser(
        "chatserve train",
        "Teach a model by the recipe of StackLLaMA: answers with votes, supervised fine-tuning, a "
        "reward model, reinforcement learning. Needs the extra chatserve[train].",
        TrainConfig,
    )
    parser.add_argument(
        "step", choices=[*STEPS], metavar="STEP",
        help="; ".join(f"{name}: {step.does}" for name, step in STEPS.items())
        + "; `chatserve train STEP --help` lists its flags",
    )  # fmt: skip
    parser.flags(argv)
    raise UsageError(f"flags of a step stand behind it: chatserve train {' | '.join(STEPS)} …")


def need(*modules: str) -> None:
    """Raise `UsageError` where a library of the extra is not installed; imports none of them."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UsageError(
                f"chatserve train needs {module}, which is not installed; "
                "run `pip install 'chatserve[train]'`"
            )
