"""What a run of reinforcement learning is asked for. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatserve.train.recipe import RlRecipe

Algorithm = Literal["ppo", "rloo", "grpo"]


@dataclass(frozen=True)
class RlPlan:
    """adapters: merged into the base first, that of fine-tuning last. data: a prepared folder.

    reward: a reward model's adapter. out: the run's folder; one that was begun goes on.
    rollout: `auto`, or a form of `rollout.EngineRollout`. forces_length: an answer goes on behind
    an end token until it has the length that was drawn for it. num_generations, beta: of RLOO and
    GRPO; None for TRL's own. keep_checkpoints: how many of the last ones stay.
    """

    weights: Path
    adapters: tuple[Path, ...]
    data: Path
    reward: Path
    out: Path
    recipe: RlRecipe
    algorithm: Algorithm = "ppo"
    rollout: str = "auto"
    forces_length: bool = True
    num_generations: int | None = None
    beta: float | None = None
    device: str = "auto"
    save_steps: int = 100
    keep_checkpoints: int = 2
