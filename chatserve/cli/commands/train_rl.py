"""`chatserve train rl WEIGHTS`: reinforcement learning against a reward model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatserve import config, environment
from chatserve.cli.commands.train import need
from chatserve.cli.commands.train_run import LIBRARIES, paths, printed_recipe
from chatserve.errors import UsageError
from chatserve.flags import CommandParser
from chatserve.settings import setting
from chatserve.train.ppo.plan import RlPlan
from chatserve.train.recipe import OURS, RL_SCRIPT, RlRecipe, published
from chatserve.train.run_options import RunOptions, only_recipe

if TYPE_CHECKING:
    from chatserve.train.ppo.loop import StepReport

_USAGE = "chatserve train rl [flags] WEIGHTS --data DIR --reward ADAPTER --out RUN"


@dataclass(frozen=True)
class TrainRlConfig(RlRecipe, RunOptions):
    """Settings of `chatserve train rl`."""

    eval_steps: int = setting(1000, "nothing is held out", flag=False)
    reward: str | None = setting(
        None, "adapter that `chatserve train reward` made on the same base", metavar="PATH"
    )
    algorithm: str = published(
        "ppo", "ppo: chatserve's own; rloo, grpo: by TRL", RL_SCRIPT,
        choices=("ppo", "rloo", "grpo"), group="recipe",
    )  # fmt: skip
    end: str = published(
        "force", "what an end token does to an answer; force: nothing, it gets the length that was "
        "drawn; stop: it ends", f"{RL_SCRIPT} (its end id was none of the vocabulary)",
        choices=("force", "stop"), group="recipe",
    )  # fmt: skip
    num_generations: int | None = published(
        None, "answers to each question, of rloo and grpo", "TRL's: 2 and 8", group="recipe", ge=2
    )
    beta: float | None = published(
        None, "weight of the divergence, of rloo and grpo", "TRL's: 0.05 and 0", group="recipe",
        ge=0,
    )  # fmt: skip
    rollout: str = published(
        "auto", "how the engine holds what draws answers; shared: in the trainer's own weights; "
        "int8: in a copy of 8 bits; auto: int8 on a CPU, and where the base is in 8 bits", OURS,
        choices=("auto", "shared", "int8"), group="recipe",
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Train and print the adapter's folder. Raises `StartupError`."""
    parser = CommandParser(
        "chatserve train rl",
        "Reinforcement learning: the model answers questions, a reward model scores the answers, "
        "and an adapter learns to get better ones without leaving the frozen start too far behind. "
        "Answers are drawn by the serving engine, with all algorithms. A run that was killed goes "
        "on from its last checkpoint to the same figures, with all of them.",
        TrainRlConfig,
    )
    parser.usage = _USAGE
    parser.add_argument("weights", nargs="?", metavar="WEIGHTS", help="a folder, file or name")
    flags = parser.flags(argv)
    weights = flags.pop("weights")
    options = config.build(TrainRlConfig, flags)
    if printed_recipe(options, options):
        return 0
    plan = _plan(weights, options)
    need(*LIBRARIES)
    logging.basicConfig(level=logging.WARNING, format="chatserve: %(message)s", stream=sys.stderr)
    if plan.algorithm == "ppo":
        from chatserve.train.ppo.training import train_ppo

        adapter = train_ppo(plan, _show_step(plan.recipe.max_steps))
    else:
        from chatserve.train.ppo.online import train_online

        adapter = train_online(plan, _show_figures)
    if environment.variables().get("RANK", "0") == "0":  # of several processes the first
        print(adapter)
    return 0


def _plan(weights: str | None, options: TrainRlConfig) -> RlPlan:
    if not options.reward:
        raise UsageError(
            "chatserve train rl wants --reward PATH, the folder `adapter` of a run of "
            "`chatserve train reward`"
        )
    path, data, run = paths("rl", weights, options)
    return RlPlan(
        weights=path,
        adapters=tuple(Path(each).expanduser() for each in options.adapter),
        data=data,
        reward=Path(options.reward).expanduser(),
        out=run.path,
        recipe=only_recipe(RlRecipe, options),
        algorithm=options.algorithm,  # type: ignore[arg-type]  # one of its choices
        rollout=options.rollout,
        forces_length=options.end == "force",
        num_generations=options.num_generations,
        beta=options.beta,
        device=options.device,
        save_steps=options.save_steps,
        keep_checkpoints=options.keep_checkpoints,
    )


def _show_step(last: int) -> Callable[[int, StepReport], None]:
    """A line for each step of PPO on stderr."""

    def show(step: int, report: StepReport) -> None:
        figures = report.figures
        print(
            f"step {step}/{last}: reward {figures['reward']:.3f}, kl {figures['kl']:.2f}, "
            f"entropy {figures['entropy']:.2f}, clipped {figures['clip_fraction']:.1%}, "
            f"penalty {figures['kl_coefficient']:.3f}",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    return show


def _show_figures(step: int, last: int, figures: Mapping[str, float]) -> None:
    """The same of TRL's trainers, in their words."""
    wanted = [name for name in ("reward", "kl", "entropy", "loss") if name in figures]
    row = ", ".join(f"{name} {figures[name]:.3f}" for name in wanted)
    print(f"step {step}/{last}: {row}", file=sys.stderr, flush=True)
