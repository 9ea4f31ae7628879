"""Sampling: exact formulas, independent rows, randomness by (seed, choice, position)."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatserve.engine.sampler import SamplingRow, distribution, penalise, sample, uniform
from chatserve.engine.sequence import SamplingParams


def row(position: int = 0, seed: int = 1, **options: Any) -> SamplingRow:
    names = {"prompt_ids", "generated_ids", "masked_ids", "choice"}
    rest = {name: options.pop(name) for name in names & set(options)}
    rest = {"prompt_ids": (), "generated_ids": (), "choice": 0, **rest}
    return SamplingRow(params=SamplingParams(**options), seed=seed, position=position, **rest)


LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])


def frequencies(count: int = 4000, **options: Any) -> list[float]:
    rows = [row(position, **options) for position in range(count)]
    counts = Counter(sample(LOGITS.expand(count, -1), rows))
    return [counts[token_id] / count for token_id in range(5)]


def test_greedy_takes_the_largest() -> None:
    assert sample(LOGITS[None], [row(temperature=0)]) == [4]


def test_frequencies_follow_the_softmax() -> None:
    expected = torch.softmax(LOGITS / 0.8, 0).tolist()
    for actual, probability in zip(frequencies(temperature=0.8), expected, strict=True):
        assert actual == pytest.approx(probability, abs=0.03)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {4, 0}),
        ({"top_k": 1}, {4}),
        ({"top_p": 0.6}, {4}),
        ({"top_p": 0.7}, {4, 0}),
        ({"top_p": 1e-9}, {4}),
        ({"min_p": 0.3}, {4, 0}),
        ({"min_p": 1.0}, {4}),
        ({"top_k": 3, "top_p": 0.95}, {4, 0, 1}),
        ({"top_k": 3, "min_p": 0.3}, {4, 0}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"logit_bias": {4: -100.0, 0: -100.0}}, {1, 2, 3}),
        ({"masked_ids": (4, 0, 1)}, {2, 3}),
    ],
)
def test_filters_keep_exactly(options: dict[str, Any], kept: set[int]) -> None:
    # softmax of LOGITS: 4: .636, 0: .234, 1: .086, 2: .032, 3: .012
    actual = frequencies(2000, **options)
    assert {token_id for token_id, share in enumerate(actual) if share} == kept


def test_top_p_over_a_flat_distribution_larger_than_the_candidates() -> None:
    values, ids = distribution(torch.zeros(5000), SamplingParams(top_p=0.5))
    assert ids is not None and len(values) == pytest.approx(2500, abs=2)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 7), st.integers(0, 2**31))
def test_uniform_depends_on_its_arguments_alone(seed: int, choice: int, position: int) -> None:
    number = uniform(seed, choice, position)
    assert 0 <= number < 1
    assert number == uniform(seed, choice, position)
    assert number != uniform(seed, choice + 1, position)
    assert number != uniform(seed, choice, position + 1)


def test_uniform_is_pinned() -> None:
    """A change here changes every seeded answer: it needs a note in the CHANGELOG."""
    assert uniform(1, 0, 0) == pytest.approx(0.33776134126730917, abs=0)


def test_a_row_gets_the_same_token_whatever_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 300, generator=generator)
    rows = [
        row(5, 11, temperature=1.3),
        row(9, 12, top_p=0.8),
        row(2, 13, top_k=7, presence_penalty=0.5, generated_ids=(3, 3, 4)),
        row(7, 14, temperature=0),
        row(1, 15, min_p=0.05, repetition_penalty=1.2, prompt_ids=(1, 2)),
        row(4, 16, logit_bias={8: 5.0}),
    ]
    alone = [sample(logits[index : index + 1], [item])[0] for index, item in enumerate(rows)]
    assert sample(logits, rows) == alone
    assert sample(logits.flip(0), rows[::-1]) == alone[::-1]


def test_repetition_penalty_counts_prompt_and_answer() -> None:
    item = row(repetition_penalty=2.0, prompt_ids=(0, 3), generated_ids=(0,))
    assert penalise(LOGITS, item).tolist() == [1.0, 1.0, 0.0, -2.0, 3.0]


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    item = row(
        presence_penalty=0.5, frequency_penalty=0.25, prompt_ids=(1,), generated_ids=(0, 0, 4)
    )
    assert penalise(LOGITS, item).tolist() == [1.0, 1.0, 0.0, -1.0, 2.25]


def test_logit_bias_is_added() -> None:
    assert penalise(LOGITS, row(logit_bias={2: 1.5}))[2] == 1.5


def test_penalties_leave_the_logits_of_the_caller_alone() -> None:
    before = LOGITS.clone()
    penalise(LOGITS, row(repetition_penalty=2.0, prompt_ids=(0,), logit_bias={1: 1.0}))
    assert torch.equal(LOGITS, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_logits_without_a_finite_value_give_minus_one_for_that_row_alone(
    value: float, temperature: float
) -> None:
    logits = torch.stack((torch.full((5,), value), LOGITS))
    rows = [row(temperature=temperature), row(temperature=0)]
    assert sample(logits, rows) == [-1, 4]


def test_one_nan_among_finite_logits_fails_the_row() -> None:
    logits = LOGITS.clone()
    logits[1] = math.nan
    assert sample(logits[None], [row(temperature=1.0)]) == [-1]
    assert sample(logits[None], [row(temperature=0)]) == [-1]


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, 5), []) == []
