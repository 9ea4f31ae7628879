"""A whole run of PPO: steps, log, checkpoints, and the adapter in the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from chatserve.train.adapter_folder import save_adapter
from chatserve.train.durable import is_on
from chatserve.train.offline import no_network
from chatserve.train.ppo.loop import NotFinite, Ppo, PpoSettings, StepReport
from chatserve.train.ppo.plan import RlPlan
from chatserve.train.ppo.policy import ADAPTER, Policy
from chatserve.train.ppo.session import Session, diverged, open_session
from chatserve.train.ppo.state import load_state, save_state
from chatserve.train.run_folder import step_of
from chatserve.train.training_log import TrainingLog

logger = logging.getLogger(__name__)

Progress = Callable[[int, StepReport], None]
"""Told of each step, in the process that writes."""


def train_ppo(plan: RlPlan, progress: Progress = lambda step, report: None) -> Path:
    """Train, or go on from the last checkpoint in `plan.out`; the adapter's folder.

    Raises `UsageError` where the run was begun with other settings, `TrainingDiverged`, and what
    `open_session` raises.
    """
    with no_network():
        from accelerate import Accelerator

        session = open_session(plan)
        accelerator = Accelerator(cpu=plan.device == "cpu")
        policy = _policy(session)
        ppo = Ppo(
            policy, session.drawer(plan.recipe.batch_size), session.reward, session.decode,
            session.queries, settings_of(session), accelerator,
        )  # fmt: skip
        first = 0
        if (checkpoint := session.run.last_checkpoint()) is not None:
            first = step_of(checkpoint)
            load_state(ppo, checkpoint)
        accelerator.wait_for_everyone()
        figures = _steps(ppo, session, first, progress, writes=accelerator.is_main_process)
        if accelerator.is_main_process:
            save_adapter(
                session.run, policy.model, session.base, kind="rl", recipe=plan.recipe,
                steps=plan.recipe.max_steps, figures=figures,
            )  # fmt: skip
        accelerator.wait_for_everyone()
        return session.run.adapter


def settings_of(session: Session) -> PpoSettings:
    """The recipe in PPO's own words."""
    recipe = session.plan.recipe
    return PpoSettings(
        batch_size=recipe.batch_size,
        mini_batch_size=recipe.mini_batch_size,
        gradient_accumulation=recipe.gradient_accumulation,
        epochs=recipe.ppo_epochs,
        learning_rate=recipe.learning_rate,
        kl_coefficient=recipe.init_kl,
        kl_target=recipe.target_kl if recipe.kl_controller == "adaptive" else None,
        kl_horizon=recipe.kl_horizon,
        gamma=recipe.gamma,
        lam=recipe.gae_lambda,
        clip_range=recipe.clip_range,
        value_clip_range=recipe.clip_range_value,
        value_coefficient=recipe.value_coefficient,
        update_kl=recipe.early_stopping_kl or None,
        reward_baseline=recipe.reward_baseline,
        min_new_tokens=recipe.min_new_tokens,
        max_new_tokens=recipe.max_new_tokens,
        sampling=session.sampling(),
        seed=recipe.seed,
    )


def _policy(session: Session) -> Policy:
    """The base with a new adapter that does nothing yet, and a value head."""
    from peft import LoraConfig, get_peft_model

    recipe, base = session.plan.recipe, session.base
    torch.manual_seed(recipe.seed)
    model = get_peft_model(
        base.model,
        LoraConfig(
            r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout,
            target_modules=list(recipe.target_modules), task_type="CAUSAL_LM", bias="none",
        ),
        adapter_name=ADAPTER,
    )  # fmt: skip
    if is_on(recipe.gradient_checkpointing, base.device):
        model.enable_input_require_grads()
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model, temperature=recipe.temperature)
    policy.value_head.to(base.device)
    return policy


def _steps(
    ppo: Ppo, session: Session, first: int, progress: Progress, *, writes: bool
) -> dict[str, float]:
    """The steps behind `first`; the last one's figures."""
    plan, run, last = session.plan, session.run, session.plan.recipe.max_steps
    log = None
    if writes:
        run.clear_writing()
        log = TrainingLog(run, first, session.settings)
    figures: dict[str, float] = {}
    try:
        for number in range(first + 1, last + 1):
            try:
                report = ppo.step(number)
            except NotFinite as error:
                raise diverged(run, str(error)) from error
            figures = report.figures
            if log is None:
                continue
            told = {f"warning_{finding.kind}": 1.0 for finding in report.findings}
            log.write(number, {**figures, **told})
            for finding in report.findings:
                logger.warning("step %d: %s", number, finding.message)
            progress(number, report)
            if number % plan.save_steps == 0 or number == last:
                run.write_checkpoint(
                    number, lambda folder: save_state(ppo, folder), keep=plan.keep_checkpoints
                )
    finally:
        if log is not None:
            log.close()
    return figures
