"""Splits: by a question's name alone, in the shares that were asked for."""

from __future__ import annotations

from collections import Counter

from chatserve.train.data.splits import SPLITS, place_of, split_of


def test_shares_are_kept() -> None:
    shares = (40, 30, 20, 10)
    lots = [place_of(str(number), 0)[1] for number in range(20_000)]
    counts = Counter(split_of(lot, shares) for lot in lots)
    for split, share in zip(SPLITS, shares, strict=True):
        assert abs(counts[split] / 20_000 - share / 100) < 0.015


def test_the_ends_belong_to_somebody() -> None:
    assert split_of(0, (1, 1, 1, 1)) == "finetune"
    assert split_of((1 << 64) - 1, (1, 1, 1, 1)) == "evaluation"
    assert split_of((1 << 64) - 1, (1_000_000, 999_999, 7, 1)) == "evaluation"


def test_places_are_fixed_for_good() -> None:
    """Data that were made with an earlier version are split like those of this one."""
    assert place_of("1", 0) == (11528375146401679944, 8943149951475378562)
    assert place_of("1", 0) != place_of("1", 1)
    found = [split_of(place_of(str(n), 0)[1], (40, 30, 20, 10)) for n in range(5)]
    assert found == ["finetune", "reward", "finetune", "reward", "rl"]
