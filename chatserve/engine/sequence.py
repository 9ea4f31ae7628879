"""Plain data of the engine: parameters, sequences, token events. No behaviour, no torch."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from chatserve.engine.block_manager import BlockTable
from chatserve.engine.grammar import Grammar
from chatserve.engine.speculation import Drafter
from chatserve.engine.waiting_line import Priority
from chatserve.errors import ChatserveError

if TYPE_CHECKING:
    from chatserve.engine.reward import Reward
    from chatserve.models.batch import NetworkAdapter

FinishReason = Literal["stop", "length", "abort"]
"""`stop` and `length` go over the wire, `abort` stays in logs."""

Phase = Literal["waiting", "prefill", "decode"]
"""What a sequence is at: waiting for its turn, also again, then its prompt, then token by token."""

Pooling = Literal["mean", "last", "cls"]
"""How the hidden states of a prompt's tokens become one vector: their mean, the last one or, of an
encoder, the first."""


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """A LoRA adapter beside the base, ready for the network; it lives as long as who uses it.

    fingerprint: of its numbers. network: the form that the model has built. base: the model that it
    was trained on, in its author's words. reward: of one that rates texts and writes none.
    """

    name: str
    fingerprint: str
    network: NetworkAdapter
    base: str | None = None
    reward: Reward | None = None


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is continued. The defaults are OpenAI's.

    Temperature 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. `seed` None lets the engine
    draw one. `max_tokens` counts generated tokens; 0 only computes the prompt. `stop` are texts,
    never shown; `stop_token_ids` are ids beside the model's own end-of-sequence ids.

    `logprobs` None: none; else those of each token and of so many likely ones at its place, of the
    distribution that it is drawn from (see `TokenLogprobs`). `prompt_logprobs`: the same for the
    prompt's tokens, of what the model says unchanged. `grammar`: what the answer must match.
    `pooling`, with `max_tokens` 0: how the prompt becomes an embedding. `shown`: special tokens
    that are shown as these texts, and others not at all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    pooling: Pooling | None = None
    shown: Mapping[int, str] = field(default_factory=dict)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


NO_POSITIONS = range(0)


@dataclass(eq=False)
class Sequence:
    """One continuation being generated: its tokens, and how far the KV cache has come.

    `token_ids` is prompt plus generated ids; the first `num_computed` of them have keys and values
    in the blocks of `table`. Sequences of one `group` that have the same prompt compute it once.
    """

    seq_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    choice: int = 0
    group: str | None = None
    table: BlockTable = field(default_factory=BlockTable)
    status: Status = Status.WAITING
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached_tokens: int = 0
    """How many of the prompt needed no computing when it was first admitted."""
    num_scored: int = 0
    """Of the prompt's tokens, behind which it is known how likely the next one is."""
    adapter: LoadedAdapter | None = None
    """What changes the base for this sequence; no other may share its keys and values."""
    drafter: Drafter | None = None
    """Guesses how `token_ids` goes on, where speculation is wanted."""
    share: bytes = b""
    """Whose it is: those who wait take turns by it."""
    priority: Priority = "interactive"

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)
        self.num_prompt_tokens = len(self.prompt_ids)

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    def scored_within(self, end: int) -> range:
        """Of the uncomputed positions before `end`, those that tell of a token of the prompt."""
        if self.params.prompt_logprobs is None:
            return NO_POSITIONS
        # a preempted sequence computes some again
        first = max(self.num_computed, self.num_scored)
        return range(first, max(first, min(end, self.num_prompt_tokens - 1)))

    def pooled_within(self, end: int) -> range:
        """Of the uncomputed positions before `end`, those whose hidden states are wanted."""
        if self.params.pooling is None:
            return NO_POSITIONS
        first = self.num_computed if self.params.pooling == "mean" else self.num_prompt_tokens - 1
        return range(first, max(first, end))


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The natural logarithm of a token's probability, and the likeliest tokens at its place.

    `top`: (id, logprob), falling; of equal ones the lower id first. What a grammar, a filter or
    `min_tokens` rules out has no probability: it is not in `top`, whose rest adds up to 1. A greedy
    sequence has them of temperature 1, without filters.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Begun:
    """What another engine has said of a sequence that is to go on here.

    `units`: the token ids of its events, one after the other; `logprobs` of each, empty where they
    are not asked for. `num_cached_tokens` is what they told. `has_ended`: the last was its last.
    """

    units: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[TokenLogprobs, ...], ...]
    num_cached_tokens: int = 0
    has_ended: bool = False


@dataclass(slots=True)  # not frozen: that takes three times as long to make, at each token
class TokenEvent:
    """What one step did for one sequence: it may have got several tokens.

    `text` is the newly safe text (may be empty while a character or a stop string is incomplete).
    `num_cached_tokens` of the prompt came from the prefix cache. The last event of a sequence has a
    `finish_reason` or an `error`, never both.

    Where they are asked for, `logprobs` has an entry for each of `token_ids`, and `prompt_logprobs`
    comes in pieces, in order, as the prompt is computed: None for its first token. An event may
    have nothing but those. `embedding` (hidden,), of whatever length, comes with the last event
    where there is `pooling`.
    """

    seq_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: ChatserveError | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    embedding: NDArray[np.float32] | None = field(default=None, compare=False)

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None
