"""On a task that can be checked the reward rises on several seeds, and the divergence is held."""

from __future__ import annotations

from statistics import fmean, stdev

import pytest

pytest.importorskip("peft", reason="needs the extra [train]")

from tests.unit.train.ppo.runs import build_ppo

STEPS = 40
EDGE = 8  # steps at the beginning and at the end that are compared


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_the_reward_rises_significantly(seed: int) -> None:
    ppo = build_ppo(
        seed=seed, batch_size=32, mini_batch_size=32, gradient_accumulation=1, learning_rate=5e-3,
        kl_coefficient=0.02, min_new_tokens=6, max_new_tokens=10,
    )  # fmt: skip
    reports = [ppo.step(number).figures for number in range(1, STEPS + 1)]
    rewards = [figures["reward"] for figures in reports]
    before, after = rewards[:EDGE], rewards[-EDGE:]
    error = ((stdev(before) ** 2 + stdev(after) ** 2) / EDGE) ** 0.5
    kl = [figures["kl"] for figures in reports]
    found = f"reward {fmean(before):.2f} to {fmean(after):.2f}, kl at most {max(kl):.1f}"
    errors = (fmean(after) - fmean(before)) / error
    print(f"\nseed {seed}: {found}, {errors:.1f} standard errors")
    assert errors > 4, found
    assert max(kl) < 40, found  # nats an answer; the penalty aims at 6
