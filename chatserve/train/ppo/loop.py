"""One step of PPO after another: draw answers, score them, update the adapter and the value head.

Follows the loop of the published run (TRL before 0.12; Ziegler et al. 2019, arXiv 1909.08593). All
that is random in a step comes from the seed and the step's number, so a run that goes on from a
checkpoint takes the same steps. Knows no files and no command line.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from chatserve.train.health import Finding, Health, StepFacts
from chatserve.train.ppo.advantages import (
    generalized_advantages,
    masked_mean,
    token_rewards,
    whiten,
)
from chatserve.train.ppo.deck import Deck, Query, seed_for
from chatserve.train.ppo.loss import (
    AdaptiveKLPenalty,
    FixedKLPenalty,
    KLPenalty,
    policy_loss,
    update_divergence,
    value_loss,
)
from chatserve.train.ppo.policy import Evaluation, Policy, Sample, collate
from chatserve.train.ppo.rollout import Drawn, Request, Sampling

if TYPE_CHECKING:
    from accelerate import Accelerator

_Item = TypeVar("_Item")
_TOO_FAR = 1.5  # times the target: then a step's updates end early


@dataclass(frozen=True)
class Scored:
    """What a reward is given: the question, the answer, and whether it ended by itself."""

    query: str
    answer: str
    has_ended: bool


Reward = Callable[[Sequence[Scored]], Sequence[float]]
"""One finite number for each answer, more for better ones."""


class Drawer(Protocol):
    """Whoever draws answers from the policy; see `EngineRollout.draw`."""

    def draw(self, requests: Sequence[Request], sampling: Sampling) -> list[Drawn]: ...


@dataclass(frozen=True)
class PpoSettings:
    """Sizes are those of one process. Answers get a length in tokens from [min, max) each.

    kl_target, kl_horizon: of the adaptive penalty; the penalty stays as it is without them.
    update_kl: nats a token by which one step's updates may move the policy; None for no limit.
    """

    batch_size: int
    mini_batch_size: int
    gradient_accumulation: int
    epochs: int
    learning_rate: float
    kl_coefficient: float
    kl_target: float | None
    kl_horizon: int
    gamma: float
    lam: float
    clip_range: float
    value_clip_range: float
    value_coefficient: float
    update_kl: float | None
    reward_baseline: float
    min_new_tokens: int
    max_new_tokens: int
    sampling: Sampling
    seed: int

    def penalty(self) -> KLPenalty:
        """As a run begins."""
        if self.kl_target is None:
            return FixedKLPenalty(self.kl_coefficient)
        return AdaptiveKLPenalty(self.kl_coefficient, self.kl_target, self.kl_horizon)


@dataclass(frozen=True)
class StepReport:
    """figures: what a step is logged with, by name. findings: of its health."""

    figures: dict[str, float]
    findings: Sequence[Finding]


@dataclass(frozen=True)
class _Experience:
    """A step's answers, and what was thought of them before any update. All (B, T)."""

    samples: Sequence[Sample]
    mask: torch.Tensor
    logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


class NotFinite(Exception):
    """A loss or a reward that is no number, in words that name it."""


class Ppo:
    """Trains a policy. A checkpoint holds `penalty`, `health` and `optimizer` beside it."""

    def __init__(
        self,
        policy: Policy,
        drawer: Drawer,
        reward: Reward,
        decode: Callable[[Sequence[int]], str],
        queries: Sequence[Query],
        settings: PpoSettings,
        accelerator: Accelerator,
    ) -> None:
        """`decode`: an answer's tokens as text, without special ones. The policy is on its device
        already; with several processes each takes its own part of the queries."""
        self.policy = policy
        self.penalty = settings.penalty()
        self.health = Health()
        self.optimizer = torch.optim.Adam(policy.trained_parameters(), lr=settings.learning_rate)
        self._wrapped = accelerator.prepare_model(policy, device_placement=False)
        self._drawer, self._reward, self._decode = drawer, reward, decode
        self._deck = Deck(queries, settings.seed)
        self._settings = settings
        self._accelerator = accelerator

    def step(self, number: int) -> StepReport:
        """Take step `number` of the run, from 1. Raises `NotFinite` before anything is updated by
        what is no number."""
        settings = self._settings
        torch.manual_seed(self._seed(number, "dropout"))
        queries = self._pick(number)
        drawn = self._draw(number, queries)
        answers = [self._decode(each.token_ids) for each in drawn]
        scored = [
            Scored(query.text, answer, each.has_ended)
            for query, answer, each in zip(queries, answers, drawn, strict=True)
        ]
        rewards = torch.tensor(list(self._reward(scored)), device=self.policy.device)
        if not math.isfinite(self._mean(rewards.sum())):  # of any process: all of them stop
            raise NotFinite(f"step {number}: a reward is no number")
        samples = [
            Sample(query.ids, each.token_ids) for query, each in zip(queries, drawn, strict=True)
        ]
        before, reference = self._evaluate(samples)
        mask = _answer_mask(samples, self.policy.device)
        divergence = torch.where(mask, before.logprobs - reference, 0.0)
        token_level = token_rewards(
            rewards - settings.reward_baseline, divergence, mask, self.penalty.coefficient
        )
        advantages, returns = generalized_advantages(
            token_level, before.values, mask, gamma=settings.gamma, lam=settings.lam
        )
        experience = _Experience(
            samples, mask, before.logprobs, before.values, whiten(advantages, mask), returns
        )
        updates = self._update(number, experience)
        kl = self._mean(divergence.sum(1).mean())
        engines = torch.tensor([each for one in drawn for each in one.logprobs])
        figures = {
            "reward": self._mean(rewards.mean()),
            "reward_std": self._mean(rewards.std(correction=0)),
            "kl": kl,
            "kl_coefficient": self.penalty.coefficient,
            "entropy": self._mean(masked_mean(before.entropy, mask)),
            "value": self._mean(masked_mean(before.values, mask)),
            "return": self._mean(masked_mean(returns, mask)),
            "answer_tokens": self._mean(mask.sum(1).float().mean()),
            "ended": self._mean(torch.tensor([float(each.has_ended) for each in drawn]).mean()),
            # how far what the engine drew from is from the policy: 0 with its very weights
            "rollout_kl": self._mean((engines - before.logprobs[mask].cpu()).mean()),
            **updates,
        }
        self.penalty.update(kl, settings.batch_size * self._accelerator.num_processes)
        facts = StepFacts(answers, [len(each.token_ids) for each in drawn], rewards.tolist(), kl)
        return StepReport(figures, self.health.observe(facts))

    def _pick(self, number: int) -> list[Query]:
        """This process's queries for a step: the data in one order after the other."""
        size = self._settings.batch_size
        first = ((number - 1) * self._accelerator.num_processes + self._place) * size
        return [self._deck.at(place) for place in range(first, first + size)]

    def _draw(self, number: int, queries: Sequence[Query]) -> list[Drawn]:
        settings = self._settings
        draw = random.Random(self._seed(number, f"lengths of {self._place}"))
        requests = [
            Request(
                query.ids,
                draw.randrange(settings.min_new_tokens, settings.max_new_tokens),
                self._seed(number, f"answer {self._place}-{index}"),
            )
            for index, query in enumerate(queries)
        ]
        self.policy.eval()
        return self._drawer.draw(requests, settings.sampling)

    @torch.no_grad()
    def _evaluate(self, samples: Sequence[Sample]) -> tuple[Evaluation, torch.Tensor]:
        """All samples by the policy, and log-probabilities by the reference: each (B, T)."""
        self.policy.eval()
        width = max(len(each.answer_ids) for each in samples)
        parts: list[tuple[torch.Tensor, ...]] = []
        for some in _slices(samples, self._settings.mini_batch_size):
            batch = collate(some, self.policy.device)
            found = self.policy(batch)
            reference = self.policy.reference_logprobs(batch)
            each = (found.logprobs, found.entropy, found.values, reference)
            parts.append(tuple(_widened(tensor, width) for tensor in each))
        logprobs, entropy, values, reference = (
            torch.cat(tensors) for tensors in zip(*parts, strict=True)
        )
        return Evaluation(logprobs, entropy, values), reference

    def _update(self, number: int, experience: _Experience) -> dict[str, float]:
        """Several passes over the step's answers; means of what the last one saw."""
        settings = self._settings
        draw = random.Random(self._seed(number, f"passes of {self._place}"))
        order = list(range(settings.batch_size))
        figures: dict[str, float] = {}
        self.policy.train()
        for epoch in range(1, settings.epochs + 1):
            draw.shuffle(order)
            seen = [
                figure
                for some in _slices(
                    order, settings.mini_batch_size * settings.gradient_accumulation
                )
                for figure in self._update_once(number, experience, some)
            ]
            figures = {
                name: self._mean(torch.stack([each[name] for each in seen]).mean())
                for name in seen[0]
            }
            figures["updates"] = float(epoch)
            limit = settings.update_kl
            if limit is not None and figures["update_kl"] > _TOO_FAR * limit:
                break
        self.policy.eval()
        return figures

    def _update_once(
        self, number: int, experience: _Experience, indices: Sequence[int]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """One step of the optimizer on the samples of `indices`."""
        parts = list(_slices(indices, self._settings.mini_batch_size))
        for index, some in enumerate(parts):
            is_last = index == len(parts) - 1
            with nullcontext() if is_last else self._accelerator.no_sync(self._wrapped):
                loss, figures = self._loss(experience, some)
                if not math.isfinite(self._mean(loss.detach())):
                    self.optimizer.zero_grad()
                    raise NotFinite(f"step {number}: the loss is no number")
                self._accelerator.backward(loss / len(parts))
            yield figures
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(
        self, experience: _Experience, indices: Sequence[int]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        settings = self._settings
        batch = collate([experience.samples[index] for index in indices], self.policy.device)
        width = batch.mask.shape[1]
        rows = torch.tensor(indices, device=batch.mask.device)

        def of(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[rows, :width]

        found: Evaluation = self._wrapped(batch)
        policy = policy_loss(
            found.logprobs, of(experience.logprobs), of(experience.advantages), batch.mask,
            settings.clip_range,
        )  # fmt: skip
        value = value_loss(
            found.values, of(experience.values), of(experience.returns), batch.mask,
            settings.value_clip_range,
        )  # fmt: skip
        loss = policy.loss + settings.value_coefficient * value.loss
        divergence = update_divergence(found.logprobs, of(experience.logprobs), batch.mask)
        return loss, {
            "loss": loss.detach(),
            "policy_loss": policy.loss.detach(),
            "value_loss": value.loss.detach(),
            "clip_fraction": policy.clip_fraction,
            "value_clip_fraction": value.clip_fraction,
            "update_kl": divergence.detach(),
        }

    @property
    def _place(self) -> int:
        """Of this process among all."""
        return int(self._accelerator.process_index)

    def _mean(self, value: torch.Tensor) -> float:
        """Of all processes."""
        reduced = self._accelerator.reduce(value.to(self.policy.device), reduction="mean")
        return float(reduced)

    def _seed(self, number: int, purpose: str) -> int:
        return seed_for(self._settings.seed, number, purpose)


def _answer_mask(samples: Sequence[Sample], device: torch.device) -> torch.Tensor:
    lengths = torch.tensor([len(each.answer_ids) for each in samples], device=device)
    return torch.arange(int(lengths.max()), device=device) < lengths[:, None]


def _widened(tensor: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))


def _slices(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
