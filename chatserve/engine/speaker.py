"""From a step's logits to what its sequences say, and how likely it was. No queue, no blocks."""

from __future__ import annotations

from collections.abc import Iterable, Set
from collections.abc import Sequence as Rows

import torch

from chatserve.engine.sampler import Sampler
from chatserve.engine.sampler_state import UNCHANGED
from chatserve.engine.scheduler import Scheduled
from chatserve.engine.sequence import TokenLogprobs
from chatserve.engine.turn import Turn
from chatserve.errors import ChatserveError, GenerationFailed

Scores = dict[str, tuple[TokenLogprobs | None, ...]]


class Speaker:
    """Samples turns to their end. `end_ids` end an answer."""

    def __init__(self, sampler: Sampler, end_ids: Set[int]) -> None:
        self._sampler = sampler
        self._end_ids = end_ids

    def score(self, batch: Rows[Scheduled], logits: torch.Tensor) -> Scores:
        """How likely the tokens behind the scored positions are, by sequence.

        Raises `GenerationFailed` where the model computed no finite logits.
        """
        scores: Scores = {}
        row = 0
        for item in batch:
            sequence, num_scored = item.sequence, len(item.scored)
            num_top = sequence.params.prompt_logprobs
            if num_top is not None and sequence.num_computed < sequence.num_prompt_tokens:
                told = self._sampler.logprobs(
                    logits, [UNCHANGED] * num_scored, range(row, row + num_scored),
                    [sequence.token_ids[position + 1] for position in item.scored],
                    [num_top] * num_scored,
                )  # fmt: skip
                if None in told:
                    raise GenerationFailed("the model computed no finite logits")
                is_first = sequence.num_scored == 0 and not sequence.num_generated_tokens
                # nothing comes before the first token that could tell
                if is_first or told:
                    scores[sequence.seq_id] = (*([None] * is_first), *told)
            row += num_scored + (1 + len(item.draft_ids)) * item.is_sampled
        return scores

    def say(
        self,
        turns: Iterable[Turn],
        logits: torch.Tensor,
        picked: Rows[int] | None,
        *,
        wants_logprobs: bool,
    ) -> None:
        """Sample each turn's next token, and the one behind it while its draft is right.

        `picked`: the next tokens by row, where the model has sampled them; those that wait for a
        mask are not among them.
        """
        speaking = [turn for turn in turns if turn.error is None]
        while speaking:
            token_ids = self._pick(logits, speaking, picked)
            picked = None
            if wants_logprobs:
                self._tell(logits, speaking, token_ids)
            speaking = [
                turn
                for turn, token_id in zip(speaking, token_ids, strict=True)
                if self._advance(turn, token_id)
            ]

    def _pick(
        self, logits: torch.Tensor, speaking: Rows[Turn], picked: Rows[int] | None
    ) -> Rows[int]:
        """The next token of each turn: `picked` already, or sampled now."""
        late = speaking
        if picked is not None:
            late = [turn for turn in speaking if turn.state.matcher is not None]
            if not late:
                return [picked[turn.row] for turn in speaking]
        sampled = self._sampler.sample(
            logits, [turn.state for turn in late], [turn.row for turn in late]
        )
        if picked is None:
            return sampled
        rest = iter(sampled)
        return [picked[turn.row] if turn.state.matcher is None else next(rest) for turn in speaking]

    def _tell(self, logits: torch.Tensor, speaking: Rows[Turn], token_ids: Rows[int]) -> None:
        """Note how likely the tokens were, for the turns that are asked for it."""
        asked = [
            (turn, token_id, turn.sequence.params.logprobs)
            for turn, token_id in zip(speaking, token_ids, strict=True)
            if turn.sequence.params.logprobs is not None and token_id >= 0
        ]
        told = self._sampler.logprobs(
            logits,
            [turn.state for turn, _, _ in asked],
            [turn.row for turn, _, _ in asked],
            [token_id for _, token_id, _ in asked],
            [num_top or 0 for _, _, num_top in asked],
        )
        for (turn, _, _), logprobs in zip(asked, told, strict=True):
            if logprobs is not None:
                turn.logprobs.append(logprobs)

    def _advance(self, turn: Turn, token_id: int) -> bool:
        try:
            return turn.advance(token_id, self._end_ids)
        except ChatserveError as error:  # a grammar that does not know its own mask
            turn.error = error
            return False
