"""RLOO and GRPO: TRL's trainers, with answers by the serving engine.

Both draw several answers to each question and compare them with each other, so there is no value
head. Source: Ahmadian et al. 2024 (arXiv 2402.14740), Shao et al. 2024 (arXiv 2402.03300).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from chatserve.errors import UsageError
from chatserve.train.durable import DurableTrainer, Report, fit, is_on, lora
from chatserve.train.offline import no_network
from chatserve.train.ppo.deck import Deck, seed_for
from chatserve.train.ppo.loop import Scored
from chatserve.train.ppo.plan import RlPlan
from chatserve.train.ppo.rollout import EngineRollout, Request
from chatserve.train.ppo.session import Session, diverged, open_session

_NUM_GENERATIONS = {"rloo": 2, "grpo": 8}  # TRL's own


class _Drawing(DurableTrainer):
    """Draws by the engine what TRL would draw by transformers' generate."""

    session: Session
    drawer: EngineRollout

    def _answers(self: Any, prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        recipe = self.session.plan.recipe
        step, place = self.state.global_step, self.accelerator.process_index

        def seed(purpose: str) -> int:
            return seed_for(recipe.seed, step, f"{purpose} of {place}")

        lengths = random.Random(seed("lengths"))
        requests = [
            Request(
                tuple(ids), lengths.randrange(recipe.min_new_tokens, recipe.max_new_tokens),
                seed(f"answer {index}"),
            )
            for index, ids in enumerate(prompt_ids)
        ]  # fmt: skip
        self.model.eval()
        drawn = self.drawer.draw(requests, self.session.sampling())
        self.model.train()
        return [list(each.token_ids) for each in drawn]

    def log(self: Any, *given: Any, **named: Any) -> None:
        """Without TRL's clock: with it no log would be like another."""
        self._metrics["train"].pop("step_time", None)
        super().log(*given, **named)  # type: ignore[misc]


class _Rloo(_Drawing, RLOOTrainer):  # type: ignore[misc]  # TRL is untyped
    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any
    ) -> list[list[int]]:
        return self._answers(prompt_ids)


class _Grpo(_Drawing, GRPOTrainer):  # type: ignore[misc]  # TRL is untyped
    def _generate_single_turn(
        self, prompt_ids: Any, *others: Any, **named: Any
    ) -> tuple[list[list[int]], None]:
        return self._answers(prompt_ids), None


def train_online(plan: RlPlan, report: Report) -> Path:
    """As `training.train_ppo`, by the algorithm that `plan` names. report: told after each step."""
    recipe = plan.recipe
    group = plan.num_generations or _NUM_GENERATIONS[plan.algorithm]
    if recipe.batch_size % recipe.mini_batch_size or recipe.batch_size % group:
        raise UsageError(
            f"--batch-size {recipe.batch_size} must be a multiple of --mini-batch-size "
            f"{recipe.mini_batch_size} and of --num-generations {group}"
        )
    with no_network():
        session = open_session(plan)
        trainer = _trainer(session, group)
        trainer.session = session
        trainer.drawer = session.drawer(recipe.batch_size)
        trainer.run, trainer.keep_checkpoints = session.run, plan.keep_checkpoints
        whole: Any = recipe  # has what those of the other steps have
        outcome = fit(trainer, session.base, session.run, whole, session.settings, report)
        return outcome.adapter


def _trainer(session: Session, group: int) -> Any:
    plan, base = session.plan, session.base
    recipe: Any = plan.recipe  # has what those of the other steps have
    kind, config = (_Rloo, RLOOConfig) if plan.algorithm == "rloo" else (_Grpo, GRPOConfig)
    beta = {} if plan.beta is None else {"beta": plan.beta}

    def score(prompts: list[str], completions: list[str], **others: Any) -> list[float]:
        texts = zip(prompts, completions, strict=True)
        rewards = session.reward([Scored(query, answer, False) for query, answer in texts])
        if not all(map(math.isfinite, rewards)):  # TRL would leave such an answer out
            raise diverged(session.run, "a reward is no number")
        return rewards

    return kind(
        model=base.model,
        reward_funcs=score,
        args=config(
            output_dir=str(session.run.writing),
            shuffle_dataset=False,  # it is in its order, see `_asked`
            seed=recipe.seed,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="constant",
            warmup_steps=0,
            optim="adamw_torch",
            max_steps=recipe.max_steps,
            per_device_train_batch_size=recipe.mini_batch_size,
            gradient_accumulation_steps=recipe.batch_size // recipe.mini_batch_size,
            num_generations=group,
            max_completion_length=recipe.max_new_tokens,
            temperature=recipe.temperature,
            top_p=recipe.top_p,
            top_k=recipe.top_k,
            epsilon=recipe.clip_range,
            bf16=is_on(recipe.bf16, base.device),
            gradient_checkpointing=is_on(recipe.gradient_checkpointing, base.device),
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=base.device.type == "cpu",
            dataloader_pin_memory=base.device.type == "cuda",
            save_strategy="steps",
            save_steps=plan.save_steps,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            **beta,
        ),
        train_dataset=_asked(session, group),
        processing_class=base.processing,
        peft_config=lora(recipe, "CAUSAL_LM"),
    )


def _asked(session: Session, group: int) -> Dataset:
    """All that a run asks, in its order: TRL's own is another where a run goes on."""
    recipe = session.plan.recipe
    deck = Deck(session.queries, recipe.seed)
    count = recipe.max_steps * recipe.batch_size * session.settings["num_processes"] // group
    return Dataset.from_dict({"prompt": [deck.at(place).text for place in range(count)]})
