"""What PPO minimises, and how hard it is held to the model that it began with. Arithmetic alone.

Shapes as in `advantages`. Source: Schulman et al. 2017 (arXiv 1707.06347, eq. 7) for the clipped
objective; Ziegler et al. 2019 (arXiv 1909.08593, §2.2) for the adaptive penalty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from chatserve.train.ppo.advantages import masked_mean

_MAX_ERROR = 0.2  # of the adaptive penalty: one step changes it by no more than this share


@dataclass(frozen=True)
class Clipped:
    """A loss, and the share of tokens at which the clipping has decided."""

    loss: torch.Tensor
    clip_fraction: torch.Tensor


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
) -> Clipped:
    """Mean of max(-A rho, -A clip(rho, 1 - c, 1 + c)) with rho = pi(token) / pi_old(token)."""
    # padding has no probabilities: a ratio of 1 keeps it from making NaN gradients
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    is_clipped = (clipped > plain).float()
    return Clipped(
        masked_mean(torch.maximum(plain, clipped), mask), masked_mean(is_clipped, mask).detach()
    )


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
) -> Clipped:
    """Half the mean of max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)."""
    near = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    plain, clipped = (values - returns).square(), (near - returns).square()
    is_clipped = (clipped > plain).float()
    return Clipped(
        0.5 * masked_mean(torch.maximum(plain, clipped), mask),
        masked_mean(is_clipped, mask).detach(),
    )


def update_divergence(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """How far an update has moved the policy, in nats a token: the mean of log pi_old - log pi."""
    return masked_mean(old_logprobs - logprobs, mask)


class FixedKLPenalty:
    """The same coefficient at every step."""

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def update(self, kl: float, num_answers: int) -> None:
        """Nothing changes."""


class AdaptiveKLPenalty:
    """A coefficient that grows while answers are further from the reference than `target` nats,
    and falls while they are nearer.

    `horizon`: of so many answers whose error is 1, the coefficient grows by a factor of about e.
    """

    def __init__(self, coefficient: float, target: float, horizon: int) -> None:
        self.coefficient = coefficient
        self._target = target
        self._horizon = horizon

    def update(self, kl: float, num_answers: int) -> None:
        """`kl`: nats an answer, the mean over the `num_answers` of a step."""
        error = min(max(kl / self._target - 1, -_MAX_ERROR), _MAX_ERROR)
        self.coefficient *= 1 + error * num_answers / self._horizon


KLPenalty = FixedKLPenalty | AdaptiveKLPenalty
