"""One run of reinforcement learning, whichever algorithm: what is opened, and what it goes on with.

The base is in memory once: policy (adapter on), reference (adapter off) and reward model (its own
adapter on, the policy's off) are the same network.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from chatserve.errors import TrainingDiverged, UsageError
from chatserve.train.adapter_folder import check_adapter_base
from chatserve.train.base import TrainingBase, identify_base, open_base, training_device
from chatserve.train.durable import is_on
from chatserve.train.ppo.deck import Query
from chatserve.train.ppo.loop import Scored
from chatserve.train.ppo.plan import RlPlan
from chatserve.train.ppo.questions import SPLIT, read_queries
from chatserve.train.ppo.rollout import EngineRollout, Sampling, choose_form
from chatserve.train.prepared_rows import data_fingerprint
from chatserve.train.reward_model import TrainedReward
from chatserve.train.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """What both ways of training need, opened. settings: what the run was begun with."""

    plan: RlPlan
    run: RunFolder
    settings: dict[str, Any]
    base: TrainingBase
    reward_model: TrainedReward
    queries: Sequence[Query]

    def drawer(self, max_answers: int) -> EngineRollout:
        """The engine that draws `max_answers` at once. To be built when the policy's adapter is in
        the base, and before anything is computed with it."""
        form = choose_form(self.base.model, self.plan.rollout)
        logger.info("answers are drawn by the engine (%s)", form)
        longest = max(len(query.ids) for query in self.queries)
        return EngineRollout(
            self.base.model, sorted(self.base.tokenizer.eos_ids), form, max_answers=max_answers,
            max_tokens=longest + self.plan.recipe.max_new_tokens,
        )  # fmt: skip

    def reward(self, answers: Sequence[Scored]) -> list[float]:
        """What the reward model says of the whole texts."""
        return self.reward_model.score([each.query + each.answer for each in answers])

    def decode(self, ids: Sequence[int]) -> str:
        return self.base.tokenizer.decode(ids)

    def sampling(self) -> Sampling:
        recipe = self.plan.recipe
        return Sampling(recipe.temperature, recipe.top_k, recipe.top_p, self.plan.forces_length)


def open_session(plan: RlPlan) -> Session:
    """Open base, data, reward model and run.

    Raises `UsageError` for settings other than the run was begun with and for data that cannot be
    used, `ModelLoadError` for a reward model that is none, or was trained on another base.
    """
    recipe, run = plan.recipe, RunFolder(plan.out)
    if recipe.min_new_tokens >= recipe.max_new_tokens:
        raise UsageError(
            f"--min-new-tokens {recipe.min_new_tokens} must be less than --max-new-tokens "
            f"{recipe.max_new_tokens}: lengths are drawn from the first up to the second"
        )
    for index, folder in enumerate(plan.adapters):
        check_adapter_base(folder, identify_base(plan.weights, adapters=plan.adapters[:index]))
    identity = identify_base(plan.weights, adapters=plan.adapters)
    check_adapter_base(plan.reward, identity)
    state = PartialState(cpu=plan.device == "cpu")
    settings = {
        "kind": "rl",
        "base": identity.fingerprint,
        "data": data_fingerprint(plan.data, [SPLIT]),
        "reward_model": _fingerprint(plan.reward),
        "num_processes": state.num_processes,
        "algorithm": plan.algorithm,
        "rollout": plan.rollout,
        "forces_length": plan.forces_length,
        "num_generations": plan.num_generations,
        "beta": plan.beta,
        "recipe": dataclasses.asdict(recipe),
    }
    with state.main_process_first():
        run.begin(settings)
    device = training_device(plan.device)
    base = open_base(
        plan.weights, device=plan.device, dtype=_dtype(plan), int8=is_on(recipe.int8, device),
        adapters=plan.adapters, seed=recipe.seed,
    )  # fmt: skip
    queries = read_queries(
        plan.data, base.processing.encode_text, most=recipe.num_questions,
        max_length=recipe.max_length,
    )  # fmt: skip
    return Session(plan, run, settings, base, TrainedReward(base, plan.reward), queries)


def diverged(run: RunFolder, fault: str) -> TrainingDiverged:
    """For a number that is none: what `fault` says, and what there is to do."""
    kept = run.last_checkpoint()
    where = f"the last good checkpoint is {kept}" if kept else "no checkpoint was made before"
    return TrainingDiverged(
        f"{fault}: the training has diverged and stops; {where}; lower --learning-rate or hold the "
        "policy nearer to the reference (--init-kl, --beta), and start in another --out"
    )


def _fingerprint(folder: Path) -> str:
    """Of an adapter's weights, whatever they are called; of none, where there are none."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("adapter_model.*")):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"rm_{digest.hexdigest()[:16]}"


def _dtype(plan: RlPlan) -> torch.dtype | None:
    """Of the base; None lets the device decide."""
    return {"on": torch.bfloat16, "off": torch.float32}.get(plan.recipe.bf16)
