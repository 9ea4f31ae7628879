"""Which step gets a question, and in which order: by a hash of its name, whatever the source."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

SPLITS = ("finetune", "reward", "rl", "evaluation")


def place_of(question_id: str, seed: int) -> tuple[int, int]:
    """Two independent numbers below 2**64: a question's place in the order, and its lot."""
    digest = blake2b(f"{seed}:{question_id}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def split_of(lot: int, shares: Sequence[int]) -> str:
    """The split in whose share of 2**64 the `lot` falls; `shares` are whole and positive."""
    point = lot * sum(shares) >> 64
    for name, share in zip(SPLITS, shares, strict=True):
        if point < share:
            return name
        point -= share
    raise AssertionError("a lot is below 2**64")
