"""Steps of PPO: what they report, that they are learnt from, and that they can be taken again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chatserve.errors import ModelLoadError
from chatserve.train.ppo.loop import NotFinite, Ppo, Scored
from chatserve.train.ppo.state import load_state, save_state
from tests.unit.train.ppo.runs import QUERIES, SETTINGS, build_ppo, share_of_low_ids

pytest.importorskip("peft", reason="needs the extra [train]")


def weights(ppo: Ppo) -> list[torch.Tensor]:
    return [each.detach().clone() for each in ppo.policy.trained_parameters()]


def are_equal(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def test_the_first_pass_over_the_first_answers_is_where_it_began() -> None:
    ppo = build_ppo(epochs=1, mini_batch_size=8, gradient_accumulation=1)
    figures = ppo.step(1).figures
    assert figures["kl"] == 0.0
    assert figures["clip_fraction"] == 0.0
    assert figures["update_kl"] == pytest.approx(0.0, abs=1e-6)
    assert figures["policy_loss"] == pytest.approx(0.0, abs=1e-5)  # whitened advantages
    assert figures["rollout_kl"] == pytest.approx(0.0, abs=1e-5)
    assert figures["entropy"] == pytest.approx(math.log(320), abs=1.0)
    assert 8 <= figures["answer_tokens"] < 12
    assert figures["kl_coefficient"] == SETTINGS.kl_coefficient
    assert ppo.step(2).figures["kl"] != 0.0


@pytest.mark.soak
def test_the_reward_rises_while_the_divergence_is_held() -> None:
    ppo = build_ppo(
        batch_size=32, mini_batch_size=32, gradient_accumulation=1, learning_rate=1e-2,
        kl_coefficient=0.02, min_new_tokens=6, max_new_tokens=8,
    )  # fmt: skip
    reports = [ppo.step(number).figures for number in range(1, 25)]
    rewards = [figures["reward"] for figures in reports]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15
    assert max(figures["kl"] for figures in reports) < 30


def test_a_step_is_the_same_again_and_after_a_checkpoint(tmp_path: Path) -> None:
    one, other = build_ppo(), build_ppo()
    before = [one.step(1).figures, one.step(2).figures]
    assert [other.step(1).figures, other.step(2).figures] == before
    save_state(one, tmp_path)
    third = build_ppo()
    load_state(third, tmp_path)
    assert third.step(3).figures == one.step(3).figures
    assert are_equal(weights(third), weights(one))
    assert third.penalty.coefficient == one.penalty.coefficient
    assert third.health.state() == one.health.state()
    assert len(third.health.state()["first"]) == 3
    assert build_ppo(seed=5).step(1).figures != before[0]


def test_a_checkpoint_of_another_policy_is_refused(tmp_path: Path) -> None:
    ppo = build_ppo()
    save_state(ppo, tmp_path)
    del ppo.policy.value_head
    with pytest.raises(ModelLoadError, match="other matrices"):
        load_state(ppo, tmp_path)


def test_a_reward_that_is_no_number_updates_nothing() -> None:
    ppo = build_ppo(lambda answers: [math.nan, *[0.0] * (len(answers) - 1)])
    before = weights(ppo)
    with pytest.raises(NotFinite, match="step 1: a reward"):
        ppo.step(1)
    assert are_equal(weights(ppo), before)


def test_a_loss_that_is_no_number_updates_nothing() -> None:
    ppo = build_ppo()
    with torch.no_grad():
        ppo.policy.value_head.summary.bias.fill_(math.inf)
    before = weights(ppo)
    with pytest.raises(NotFinite, match="step 1: the loss"):
        ppo.step(1)
    assert are_equal(weights(ppo), before)


def test_updates_end_early_when_they_have_moved_the_policy_too_far() -> None:
    assert build_ppo(update_kl=1e-9, learning_rate=0.1).step(1).figures["updates"] < 4
    assert build_ppo(update_kl=None, learning_rate=0.1).step(1).figures["updates"] == 4


def test_the_penalty_adapts_to_what_was_measured() -> None:
    ppo = build_ppo()
    report = ppo.step(1)  # whose divergence is 0: the largest step downwards
    assert report.figures["kl_coefficient"] == 0.05
    assert ppo.penalty.coefficient == pytest.approx(0.05 * (1 - 0.2 * 8 / 200))


def test_every_question_is_asked_before_one_is_asked_again() -> None:
    asked: list[str] = []

    def note(answers: Sequence[Scored]) -> list[float]:
        asked.extend(each.query for each in answers)
        return share_of_low_ids(answers)

    ppo = build_ppo(note, batch_size=2, mini_batch_size=2, epochs=1)
    for number in range(1, 5):
        ppo.step(number)
    rounds = [asked[:4], asked[4:]]
    assert [sorted(each) for each in rounds] == [[query.text for query in QUERIES]] * 2


def test_settings_decide_whether_the_penalty_adapts() -> None:
    assert replace(SETTINGS, kl_target=None).penalty().coefficient == SETTINGS.kl_coefficient
