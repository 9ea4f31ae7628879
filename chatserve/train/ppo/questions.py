"""The questions that reinforcement learning asks: the part `rl` of a prepared folder."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from chatserve.errors import UsageError
from chatserve.train.ppo.deck import Query
from chatserve.train.prepared_rows import read_rows
from chatserve.train.texts import query_text

SPLIT = "rl"


def read_queries(
    data: Path, encode: Callable[[str], list[int]], *, most: int, max_length: int
) -> list[Query]:
    """The first `most` questions as the policy is asked them, without those of more than
    `max_length` tokens.

    Raises `UsageError` where none is left.
    """
    queries, num_seen = [], 0
    for (question,) in islice(read_rows(data, SPLIT, ("question",)), most):
        num_seen += 1
        text = query_text(question)
        ids = encode(text)
        if len(ids) <= max_length:
            queries.append(Query(text, tuple(ids)))
    if not queries:
        raise UsageError(
            f"{data}: none of its {num_seen} {SPLIT} questions has at most {max_length} tokens; "
            "raise --max-length, or take other data"
        )
    return queries
