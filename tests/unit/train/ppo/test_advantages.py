"""Rewards, advantages and whitening against figures worked out by hand."""

import math

import torch

from chatserve.train.ppo.advantages import (
    generalized_advantages,
    masked_mean,
    token_rewards,
    whiten,
)

MASK = torch.tensor([[True, True, True], [True, False, False]])
NOISE = 7.0  # of padding: it must not be seen


def test_the_score_comes_at_the_last_token_and_the_penalty_at_each() -> None:
    kl = torch.tensor([[0.5, -0.25, 1.0], [2.0, NOISE, NOISE]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), kl, MASK, 0.2)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 0.05, 1.8], [-1.4, 0.0, 0.0]]))


def test_advantages_are_those_of_the_paper() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]])
    values = torch.tensor([[0.5, 0.2, 0.1], [1.0, NOISE, NOISE]])
    advantages, returns = generalized_advantages(rewards, values, MASK, gamma=1.0, lam=0.95)
    # deltas -0.3, -0.1, 0.9: 0.9; -0.1 + 0.95 * 0.9; -0.3 + 0.95 * 0.755
    torch.testing.assert_close(advantages, torch.tensor([[0.41725, 0.755, 0.9], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.91725, 0.955, 1.0], [2.0, 0.0, 0.0]]))


def test_what_comes_later_is_discounted() -> None:
    rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.2, 0.4]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantages, _ = generalized_advantages(rewards, values, mask, gamma=0.9, lam=0.5)
    # deltas 0.9 * 0.4 - 0.2 = 0.16 and 0.6: 0.16 + 0.45 * 0.6
    torch.testing.assert_close(advantages, torch.tensor([[0.43, 0.6]]))


def test_whitened_values_have_mean_0_and_deviation_1_without_padding() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [6.0, NOISE, NOISE]])
    white = whiten(values, MASK)
    # mean 3, squares 4 + 1 + 0 + 9 over 3
    deviation = math.sqrt(14 / 3)
    expected = torch.tensor([[-2 / deviation, -1 / deviation, 0.0], [3 / deviation, 0.0, 0.0]])
    torch.testing.assert_close(white, expected)


def test_one_value_alone_becomes_0() -> None:
    white = whiten(torch.tensor([[5.0, NOISE]]), torch.tensor([[True, False]]))
    assert white.tolist() == [[0.0, 0.0]]


def test_a_mean_does_not_see_padding_that_is_no_number() -> None:
    values = torch.tensor([[1.0, 3.0, math.nan]])
    assert masked_mean(values, torch.tensor([[True, True, False]])) == 2.0
