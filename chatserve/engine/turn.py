"""What one sequence says in one step: a token, and more while its draft turns out right."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from collections.abc import Set
from dataclasses import dataclass, field

from chatserve.engine.output import OutputText
from chatserve.engine.pooling import Pooler
from chatserve.engine.sampler_state import SamplerState
from chatserve.engine.sequence import FinishReason, Sequence, TokenLogprobs
from chatserve.errors import ChatserveError, GenerationFailed


@dataclass(eq=False)
class Live:
    """A sequence that has not ended, with what becomes of its tokens."""

    sequence: Sequence
    output: OutputText
    state: SamplerState
    pooler: Pooler | None = None


@dataclass(slots=True)
class Turn:
    """`row`: of the step's logits, where the next token comes from. `error`: why there is none."""

    sequence: Sequence
    state: SamplerState
    output: OutputText
    draft_ids: Rows[int]
    row: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str = ""
    reason: FinishReason | None = None
    error: ChatserveError | None = None

    @property
    def num_accepted(self) -> int:
        """Tokens of the draft that have become the sequence's own."""
        return max(0, len(self.token_ids) - 1)

    def advance(self, token_id: int, end_ids: Set[int]) -> bool:
        """Append a sampled token; true if the draft foretold it and the sequence goes on.

        A `token_id` below 0 says that there is none.
        """
        if token_id < 0:
            self.error = GenerationFailed("the model computed no finite logits")
            return False
        self.sequence.token_ids.append(token_id)
        self.state.add(token_id)
        self.token_ids.append(token_id)
        self.row += 1
        params, matcher = self.sequence.params, self.state.matcher
        # a grammar says itself where its answer may end
        is_eos = token_id in end_ids and (matcher is not None or not params.ignore_eos)
        is_end = is_eos or token_id in params.stop_token_ids
        text, is_stop = self.output.add(token_id, is_hidden=is_end)
        if matcher is not None and not is_end:
            matcher.accept(token_id)
        if is_end or is_stop or (matcher is not None and matcher.is_finished):
            self.reason = "stop"
        elif self.sequence.num_generated_tokens >= params.max_tokens:
            self.reason = "length"
        if self.reason and not is_stop:
            text += self.output.finish()
        self.text += text
        num_said = len(self.token_ids)
        return (
            num_said <= len(self.draft_ids)
            and self.draft_ids[num_said - 1] == token_id
            and self.reason is None
        )
