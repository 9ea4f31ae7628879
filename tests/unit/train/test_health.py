"""What goes wrong is told, with what to change; a healthy run is told nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest

from chatserve.train.health import Finding, Health, StepFacts, correlation, repetition

WINDOW = 5
WORDS = ["the", "list", "is", "sorted", "by", "key", "then", "each", "pair", "gets", "a", "place"]


def prose(draw: random.Random, num_words: int = 60) -> str:
    return " ".join(draw.choice(WORDS) + str(draw.randrange(100)) for _ in range(num_words))


def step(
    number: int,
    *,
    texts: Sequence[str] = (),
    lengths: Sequence[int] = (),
    rewards: Sequence[float] = (),
    kl: float = 1.0,
) -> StepFacts:
    """Eight healthy answers, but for what is said otherwise; rewards rise step by step."""
    draw = random.Random(number)
    return StepFacts(
        texts or [prose(draw) for _ in range(8)],
        lengths or [draw.randrange(32, 128) for _ in range(8)],
        rewards or [0.05 * number + draw.gauss(0, 1) for _ in range(8)],
        kl + draw.gauss(0, 0.3),
    )


def run(*steps: StepFacts) -> list[Finding]:
    health = Health(WINDOW)
    return [finding for each in steps for finding in health.observe(each)]


def kinds(findings: Sequence[Finding]) -> list[str]:
    return [finding.kind for finding in findings]


def test_a_healthy_run_is_told_nothing() -> None:
    assert run(*(step(number) for number in range(40))) == []


HACKED = {
    "repetition": "Sort the list first. " * 15,
    "code-fences": "\n".join(f"```\nf{number}(x)\n```" for number in range(3)),
}


@pytest.mark.parametrize("kind", HACKED)
def test_a_reward_that_likes_empty_form_is_told(kind: str) -> None:
    before = [step(number, rewards=[0.0] * 8) for number in range(WINDOW)]
    after = [step(WINDOW + n, texts=[HACKED[kind]] * 8, rewards=[2.0] * 8) for n in range(WINDOW)]
    (finding,) = run(*before, *after)
    assert finding.kind == kind
    assert "0.00 at first" in finding.message
    assert "--init-kl" in finding.message


@pytest.mark.parametrize("kind", HACKED)
def test_the_same_form_from_the_start_or_without_reward_is_no_hack(kind: str) -> None:
    hacked = [HACKED[kind]] * 8
    assert run(*(step(number, texts=hacked) for number in range(3 * WINDOW))) == []
    before = [step(number, rewards=[1.0] * 8) for number in range(WINDOW)]
    after = [step(WINDOW + n, texts=hacked, rewards=[0.5] * 8) for n in range(WINDOW)]
    assert run(*before, *after) == []


def test_a_divergence_below_zero_is_told() -> None:
    (finding,) = run(*(step(number, kl=-3.0) for number in range(WINDOW)))
    assert finding.kind == "negative-kl"
    assert "--end stop" in finding.message


def test_a_divergence_that_scatters_around_zero_is_not() -> None:
    draw = random.Random(3)
    assert run(*(step(number, kl=draw.gauss(0.0, 0.4)) for number in range(40))) == []


@pytest.mark.parametrize(("sign", "way"), [(1, "long"), (-1, "short")])
def test_a_reward_that_follows_the_length_is_told(sign: int, way: str) -> None:
    lengths = [32, 44, 56, 68, 80, 92, 104, 116]
    rewards = [sign * length / 50 for length in lengths]
    (finding,) = run(*(step(n, lengths=lengths, rewards=rewards) for n in range(WINDOW)))
    assert finding.kind == "length-bias"
    assert f"learns to be {way}" in finding.message
    assert "--max-new-tokens" in finding.message


def test_each_trouble_is_told_once_and_again_after_it_had_gone() -> None:
    bad = [step(number, kl=-3.0) for number in range(WINDOW)]
    good = [step(number) for number in range(2 * WINDOW)]
    assert kinds(run(*bad, *bad)) == ["negative-kl"]
    assert kinds(run(*bad, *good, *bad)) == ["negative-kl"] * 2


def test_it_goes_on_from_a_checkpoint() -> None:
    steps = [step(number) for number in range(WINDOW)] + [step(9, kl=-9.0)] * WINDOW
    whole, first, second = Health(WINDOW), Health(WINDOW), Health(WINDOW)
    expected = [whole.observe(each) for each in steps]
    found = [first.observe(each) for each in steps[:7]]
    second.restore(json.loads(json.dumps(first.state())))
    assert found + [second.observe(each) for each in steps[7:]] == expected
    assert any(expected)


def test_repetition_is_a_share_of_characters() -> None:
    assert repetition("short") == 0.0
    assert repetition("abcdefghijklmnopqrstuvwxyz0123456789") == 0.0
    assert repetition("a" * 1000) > 0.99
    assert repetition("列表先排序。" * 50) > 0.9  # no spaces between words
    text = prose(random.Random(0))
    assert repetition(text) < 0.05
    assert repetition(f"{text} {text}") == pytest.approx(0.5, abs=0.05)


def test_correlation() -> None:
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert correlation([1, 2, 3], [5, 5, 5]) == 0.0
