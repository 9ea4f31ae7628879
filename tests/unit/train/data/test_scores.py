"""Scores: the published examples, and exactly the nearest power of two for any count."""

from __future__ import annotations

import math

import pytest

from chatserve.train.data.scores import score_of


@pytest.mark.parametrize(
    ("votes", "is_accepted", "score"),
    [
        (0, False, 0), (1, False, 1), (2, False, 2), (5, False, 3), (10, True, 4), (100, False, 7),
        (-3, False, -1), (-3, True, -1), (0, True, 1),
    ],
)  # fmt: skip
def test_published_examples(votes: int, is_accepted: bool, score: int) -> None:
    assert score_of(votes, is_accepted=is_accepted) == score


def test_it_is_the_rounded_logarithm() -> None:
    for votes in range(5000):
        assert score_of(votes, is_accepted=False) == round(math.log2(1 + votes))


def test_counts_beyond_floating_point_are_rounded_right() -> None:
    below = math.isqrt(1 << 161)  # the last whole number below 2 ** 80.5
    assert score_of(below - 1, is_accepted=False) == 80
    assert score_of(below, is_accepted=False) == 81
    assert round(math.log2(below)) == round(math.log2(below + 1))  # what a float cannot tell apart
