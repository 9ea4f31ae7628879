"""What sampling remembers of one sequence: parameters, tokens seen, place in its random numbers.

Lists of ids ascend, so that a block of the vocabulary finds its own; one more costs a search and a
short move, however long the prompt and the answer. Knows no logits.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np

from chatserve.engine.grammar import Matcher
from chatserve.engine.sequence import SamplingParams
from chatserve.models.kernel_sampler import SamplingRecord

_MASK = 2**64 - 1
_Array = np.ndarray[Any, np.dtype[Any]]


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    return float(split_mix(split_mix(seed, choice), position) >> 11) * 2.0**-53


def split_mix(stream: int, index: int) -> int:
    """Number `index` of the stream that SplitMix64 (Steele, Lea & Flood 2014) draws from a seed."""
    z = (stream + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


class SamplerState:
    """Everything that a sequence's next token depends on besides its logits.

    Of the tokens so far it keeps what the parameters ask for: `seen_ids`, prompt and answer, for
    the repetition penalty; `offset_ids` with `offsets`, the logit bias less the presence and
    frequency penalties of the answer's tokens. `record` says the same to the kernels.

    With a grammar, `matcher` is how far the answer has come in it, and `allowed` are its mask's
    words, which somebody has to fill before each token. Then the grammar alone says when an answer
    may end: `min_tokens` has no say.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Rows[int],
        *,
        seed: int,
        choice: int = 0,
        end_ids: Iterable[int] = (),
        vocab_size: int,
    ) -> None:
        """`end_ids` end an answer, as stop tokens do; `min_tokens` masks both."""
        self.params = params
        self.seed = seed
        self.choice = choice
        self._seen_ids = array("i")
        self._counts: dict[int, int] = {}
        self._is_counting = params.presence_penalty != 0 or params.frequency_penalty != 0
        self._offset_ids, self._offsets = array("i"), array("f")
        self.matcher: Matcher | None = params.grammar.matcher() if params.grammar else None
        self.allowed = np.zeros(-(-vocab_size // 32) if self.matcher else 0, np.uint32)
        self._masked_ids = np.array(
            sorted(id_ for id_ in {*end_ids, *params.stop_token_ids} if id_ < vocab_size),
            dtype=np.int32,
        )
        self.record = SamplingRecord(
            temperature=params.temperature,
            top_p=params.top_p,
            min_p_margin=min_p_margin(params),
            stream=split_mix(seed, choice),
            position=len(prompt_ids),
            masked_until=len(prompt_ids) + (0 if self.matcher else params.min_tokens),
            masked_ids=self._masked_ids.ctypes.data,
            num_masked=len(self._masked_ids),
            top_k=min(params.top_k, 2**31 - 1),
            is_greedy=params.is_greedy,
            repetition_penalty=params.repetition_penalty,
            allowed=self.allowed.ctypes.data if self.matcher else None,
        )
        self.address = self.record.address
        if params.repetition_penalty != 1:
            self._seen_ids.extend(sorted(set(prompt_ids)))
            self._point_to_seen()
        if params.logit_bias:
            self._offset_ids.extend(sorted(params.logit_bias))
            self._offsets.extend(params.logit_bias[id_] for id_ in self._offset_ids)
            self._point_to_offsets()

    def add(self, token_id: int) -> None:
        """Go on to the next position: `token_id` stands at this one."""
        self.record.position += 1
        if self.params.repetition_penalty != 1:
            place = bisect_left(self._seen_ids, token_id)
            if not _has_at(self._seen_ids, place, token_id):
                self._seen_ids.insert(place, token_id)
                self._point_to_seen()
        if self._is_counting:
            self._count(token_id)

    @property
    def position(self) -> int:
        """Index of the token to be sampled, counted from the start of the prompt."""
        return int(self.record.position)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the largest logit it is, as the model computed them."""
        changes = self._seen_ids or self._offset_ids or len(self.masked_ids) or self.matcher
        return self.params.is_greedy and not changes

    @property
    def seen_ids(self) -> _Array:
        """Ascending; a copy, as those below are."""
        return np.array(self._seen_ids, np.int32)

    @property
    def offset_ids(self) -> _Array:
        return np.array(self._offset_ids, np.int32)

    @property
    def offsets(self) -> _Array:
        return np.array(self._offsets, np.float32)

    @property
    def masked_ids(self) -> _Array:
        """Ids that are not to stand at this position."""
        is_masked = self.record.position < self.record.masked_until
        return self._masked_ids if is_masked else self._masked_ids[:0]

    @property
    def ruled_out(self) -> _Array:
        """(V,) of bool: what the grammar does not allow at this position; empty without one."""
        is_allowed: _Array = np.unpackbits(self.allowed.view(np.uint8), bitorder="little")
        return np.equal(is_allowed, 0)

    def _count(self, token_id: int) -> None:
        params = self.params
        count = self._counts[token_id] = self._counts.get(token_id, 0) + 1
        penalty = params.presence_penalty + params.frequency_penalty * count
        offset = params.logit_bias.get(token_id, 0.0) - penalty
        place = bisect_left(self._offset_ids, token_id)
        if _has_at(self._offset_ids, place, token_id):
            self._offsets[place] = offset
            return
        self._offset_ids.insert(place, token_id)
        self._offsets.insert(place, offset)
        self._point_to_offsets()

    def _point_to_seen(self) -> None:
        self.record.seen_ids, self.record.num_seen = self._seen_ids.buffer_info()

    def _point_to_offsets(self) -> None:
        self.record.offset_ids, self.record.num_offsets = self._offset_ids.buffer_info()
        self.record.offsets, _ = self._offsets.buffer_info()


def min_p_margin(params: SamplingParams) -> float:
    """How far below the largest logit min-p keeps one (at most 0); -inf when it is off."""
    return params.temperature * math.log(params.min_p) if params.min_p > 0 else -math.inf


def _has_at(ids: array[int], place: int, token_id: int) -> bool:
    return place < len(ids) and ids[place] == token_id


UNCHANGED = SamplerState(SamplingParams(), (), seed=0, vocab_size=0)
"""Of no sequence: for what the model says, whatever anybody asks for."""
