"""What votes are worth: the score of an answer. Pure arithmetic."""

from __future__ import annotations


def score_of(votes: int, *, is_accepted: bool) -> int:
    """round(log2(1 + votes)), and 1 more where the asker accepted; -1 where votes are negative.

    Exact for any size: log2 of a whole number never ends in .5, so the nearer power of two is
    found by comparing squares. Source: Askell et al. 2021, arXiv 2112.00861, §4.1, as published
    with stack-exchange-preferences.
    """
    if votes < 0:
        return -1
    num = 1 + votes
    power = num.bit_length() - 1
    is_nearer_to_next = num * num > 1 << (2 * power + 1)
    return power + is_nearer_to_next + is_accepted
