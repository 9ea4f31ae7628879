"""What an answer says of the turns that gave way to it: in its usage, and in headers, which a
stream without usage has, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the relay, which passes the headers on, knows no engine
    from chatserve.engine.rolling import Rolled

TOKENS_HEADER = "x-chatserve-prompt-tokens-dropped"
MESSAGES_HEADER = "x-chatserve-messages-dropped"


def dropped_usage(rolled: Rolled | None) -> dict[str, Any]:
    """Nothing for a request that did not ask for truncation."""
    if rolled is None:
        return {}
    return {
        "prompt_tokens_dropped": rolled.num_tokens_dropped,
        "messages_dropped": list(rolled.messages_dropped),
    }


def dropped_headers(rolled: Rolled | None) -> Mapping[str, str]:
    """Nothing where nothing was dropped."""
    if rolled is None or not rolled.messages_dropped:
        return {}
    return {
        TOKENS_HEADER: str(rolled.num_tokens_dropped),
        MESSAGES_HEADER: in_ranges(rolled.messages_dropped),
    }


def out_of_ranges(text: str) -> list[int]:
    """The numbers that `in_ranges` was given."""
    ends = [part.partition("-")[::2] for part in text.split(",")]
    return [each for start, end in ends for each in range(int(start), int(end or start) + 1)]


def in_ranges(places: Sequence[int]) -> str:
    """Ascending numbers in short: `1-4,7`."""
    ends = [end for end, start in pairwise(places) if start != end + 1]
    starts = [start for end, start in pairwise(places) if start != end + 1]
    ranges = zip([places[0], *starts], [*ends, places[-1]], strict=True)
    return ",".join(str(start) if start == end else f"{start}-{end}" for start, end in ranges)
