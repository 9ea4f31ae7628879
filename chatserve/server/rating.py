"""What a reward model reads of a request: token ids of whole texts, never cut. Knows no engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

from chatserve.engine.reward import Reward
from chatserve.engine.sequence import SamplingParams
from chatserve.engine.tokenization import MAX_BYTES_PER_TOKEN
from chatserve.errors import ContextLengthExceeded
from chatserve.server.contract import ServedModel

RATING = SamplingParams(max_tokens=0, pooling="last")
"""The network reads a text, and its last token's state is wanted."""


def rated_ids(
    model: ServedModel, reward: Reward, text: str, *, behind: Sequence[int] = ()
) -> tuple[int, ...]:
    """Of a whole text, as the reward model was trained on it; or of one that continues the ids
    `behind`. It may be longer than the model holds."""
    ids = model.tokenization.of_text(text, add_special_tokens=not behind)
    return (*behind, *ids, *reward.end_ids)


def check_text(text: str, model: ServedModel, what: str, param: str) -> None:
    """Raises `ContextLengthExceeded` for a text that cannot fit, without encoding it."""
    num_bytes = len(text.encode())
    if num_bytes > model.context_length * MAX_BYTES_PER_TOKEN:
        raise ContextLengthExceeded(
            f"{what} has {num_bytes:,} bytes, which cannot fit into the {model.context_length:,} "
            f"tokens of {model.names[0]}; shorten it: a reward model rates whole texts",
            param=param,
        )


def check_length(ids: Sequence[int], model: ServedModel, what: str, param: str) -> None:
    """Raises `ContextLengthExceeded`."""
    if len(ids) > model.context_length:
        raise ContextLengthExceeded(
            f"{what} has {len(ids):,} tokens, {model.names[0]} holds {model.context_length:,}; "
            "shorten it: a reward model rates whole texts",
            param=param,
        )


def sigmoid(score: float) -> float:
    """From 0 to 1; of two texts' difference it is how likely the first is to be preferred."""
    if score >= 0:
        return 1 / (1 + math.exp(-score))
    return math.exp(score) / (1 + math.exp(score))
