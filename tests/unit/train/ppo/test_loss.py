"""The clipped losses and the penalties against figures worked out by hand."""

import math

import pytest
import torch

from chatserve.train.ppo.loss import (
    AdaptiveKLPenalty,
    FixedKLPenalty,
    policy_loss,
    update_divergence,
    value_loss,
)

MASK = torch.tensor([[True, True, True, False]])


def log(*ratios: float) -> torch.Tensor:
    return torch.tensor([[math.log(ratio) for ratio in ratios]])


def test_the_policy_gains_nothing_beyond_the_clip_range() -> None:
    logprobs = log(1.5, 0.5, 1.1, 9.0).requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 2.0, 5.0]])
    found = policy_loss(logprobs, torch.zeros(1, 4), advantages, MASK, 0.2)
    # max(-1.5, -1.2), max(0.5, 0.8), -2.2: two of three are clipped
    assert found.loss.item() == pytest.approx((-1.2 + 0.8 - 2.2) / 3)
    assert found.clip_fraction.item() == pytest.approx(2 / 3)
    found.loss.backward()
    # of a clipped token the loss does not depend; of the third: -A rho / 3
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 0.0, -2.2 / 3, 0.0]]))


def test_a_policy_is_drawn_back_from_a_wrong_side() -> None:
    logprobs = log(0.5).requires_grad_()
    found = policy_loss(
        logprobs, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), 0.2
    )
    assert (found.loss.item(), found.clip_fraction.item()) == (-0.5, 0.0)
    found.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == -0.5


def test_padding_without_a_probability_makes_no_nan() -> None:
    logprobs = torch.tensor([[0.0, 0.0, 0.0, math.inf]], requires_grad=True)
    found = policy_loss(logprobs, torch.zeros(1, 4), torch.ones(1, 4), MASK, 0.2)
    found.loss.backward()
    assert found.loss.item() == -1.0
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()


def test_a_value_is_rewarded_only_near_the_old_one() -> None:
    values, old = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = value_loss(values, old, torch.zeros(1, 2), mask, 0.2)
    # max(1, 0.7^2) and max(0, 0.3^2), half of their mean
    assert found.loss.item() == pytest.approx(0.5 * (1.0 + 0.09) / 2)
    assert found.clip_fraction.item() == 0.5


def test_how_far_an_update_has_moved_the_policy() -> None:
    moved = update_divergence(
        torch.tensor([[-1.0, -2.0, -3.0, 9.0]]), torch.tensor([[-0.5, -1.0, -3.0, 0.0]]), MASK
    )
    assert moved.item() == pytest.approx((0.5 + 1.0 + 0.0) / 3)


@pytest.mark.parametrize(
    ("kl", "error"), [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2)]
)
def test_the_adaptive_penalty_follows_the_divergence(kl: float, error: float) -> None:
    penalty = AdaptiveKLPenalty(0.2, target=6.0, horizon=10_000)
    penalty.update(kl, num_answers=8)
    assert penalty.coefficient == pytest.approx(0.2 * (1 + error * 8 / 10_000))


def test_the_fixed_penalty_does_not() -> None:
    penalty = FixedKLPenalty(0.05)
    penalty.update(60.0, num_answers=8)
    assert penalty.coefficient == 0.05
