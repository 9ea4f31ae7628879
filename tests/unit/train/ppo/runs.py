"""Small runs of PPO whose reward can be checked: answers of digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from chatserve.train.ppo.deck import Query
from chatserve.train.ppo.loop import Ppo, PpoSettings, Reward, Scored
from chatserve.train.ppo.rollout import EngineRollout, Sampling
from tests.tiny import EOS_ID
from tests.unit.train.ppo.models import build_policy

SETTINGS = PpoSettings(
    batch_size=8, mini_batch_size=4, gradient_accumulation=2, epochs=4, learning_rate=1e-2,
    kl_coefficient=0.05, kl_target=6.0, kl_horizon=200, gamma=1.0, lam=0.95, clip_range=0.2,
    value_clip_range=0.2, value_coefficient=0.1, update_kl=0.1, reward_baseline=0.0,
    min_new_tokens=8, max_new_tokens=12, sampling=Sampling(ignores_end=True), seed=0,
)  # fmt: skip
QUERIES = [Query(f"Question: {letter}", tuple(f"Question: {letter}".encode())) for letter in "abcd"]
LETTERS = 65  # ids 65 … 90 of the tiny vocabulary


def decode(ids: Sequence[int]) -> str:
    return "".join("d" if id_ < 80 else "x" for id_ in ids)


def share_of_low_ids(answers: Sequence[Scored]) -> list[float]:
    """2 for an answer of ids below 80 alone, 0 for one without any; by chance 0.5."""
    return [2 * each.answer.count("d") / len(each.answer) for each in answers]


def build_ppo(reward: Reward = share_of_low_ids, **changes: object) -> Ppo:
    from accelerate import Accelerator

    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    policy = build_policy()
    for name, weight in policy.named_parameters():
        if "lora_B" in name or name.startswith("value_head"):
            weight.data.zero_()  # as a run begins
    drawer = EngineRollout(
        policy.network, [EOS_ID], "shared", max_answers=settings.batch_size, max_tokens=64
    )
    return Ppo(policy, drawer, reward, decode, QUERIES, settings, Accelerator(cpu=True))
