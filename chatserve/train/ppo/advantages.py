"""Rewards per token, and how much better each token was than expected. Arithmetic alone.

Shapes: B answers of at most T tokens, right-padded; `mask` (B, T) bool is True for tokens. Source:
Schulman et al. 2016 (arXiv 1506.02438, eq. 16) for the advantages; Ziegler et al. 2019
(arXiv 1909.08593, §2.2) for the reward with its penalty.
"""

from __future__ import annotations

import torch


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of the values (B, T) that `mask` holds; one of it must."""
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def token_rewards(
    scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, kl_coefficient: float
) -> torch.Tensor:
    """(B, T): minus `kl_coefficient` times `kl` (B, T) at each token, the score too at the last.

    kl: log pi(token) - log pi_ref(token), the divergence as one sample estimates it. scores: (B,).
    """
    rewards = torch.where(mask, -kl_coefficient * kl, 0.0)
    last = mask.sum(1) - 1
    rewards[torch.arange(len(rewards), device=rewards.device), last] += scores
    return rewards


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns (B, T): A_t = delta_t + gamma lam A_{t+1}, R_t = A_t + V_t.

    delta_t = r_t + gamma V_{t+1} - V_t, and an answer is worth nothing behind its last token.
    values: (B, T), what the value head expects before each token is drawn.
    """
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_advantage = torch.where(mask[:, t], advantage, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = next_advantage
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values (B, T) with mean 0 and standard deviation 1 over `mask`, and 0 outside of it.

    The variance is that of a sample (n - 1), as in TRL; a single value becomes 0.
    """
    mean = masked_mean(values, mask)
    centred = torch.where(mask, values - mean, 0.0)
    variance = centred.square().sum() / (mask.sum() - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + 1e-8)
