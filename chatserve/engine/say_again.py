"""A sequence that another engine has begun: said again from its token ids, as if it was here.

Penalties, stop strings, grammar and random numbers are then where they were, and nothing has been
computed. Knows no queue and no tensors.
"""

from __future__ import annotations

from collections.abc import Set

from chatserve.engine.sequence import Begun, FinishReason, Sequence, Status, TokenEvent
from chatserve.engine.turn import Live, Turn
from chatserve.errors import ChatserveError, InvalidRequest


def say_again(live: Live, begun: Begun, *, end_ids: Set[int], vocab_size: int) -> list[TokenEvent]:
    """The events of before; `live` goes on behind them, as one does that was preempted.

    Raises `InvalidRequest` for what the sequence cannot have said.
    """
    sequence = live.sequence
    if not begun.units:
        return []
    sequence.num_cached_tokens = begun.num_cached_tokens
    sequence.status = Status.PREEMPTED
    last = len(begun.units) - 1
    events = []
    for number, (unit, logprobs) in enumerate(zip(begun.units, begun.logprobs, strict=True)):
        turn = _say(live, unit, end_ids, vocab_size)
        reason: FinishReason | None = turn.reason
        if sequence.params.max_tokens == 0:
            reason = "length"
        if (reason is not None) != (begun.has_ended and number == last):
            raise _cannot_be(sequence, "ends where its tokens do not, or goes on where they end")
        events.append(
            TokenEvent(
                seq_id=sequence.seq_id,
                text=turn.text,
                token_ids=unit,
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_generated_tokens=sequence.num_generated_tokens,
                num_cached_tokens=sequence.num_cached_tokens,
                finish_reason=reason,
                logprobs=logprobs,
            )
        )
    return events


def _say(live: Live, unit: tuple[int, ...], end_ids: Set[int], vocab_size: int) -> Turn:
    """What one step said."""
    sequence = live.sequence
    turn = Turn(sequence, live.state, live.output, (), 0)
    for token_id in unit:
        if turn.reason is not None:
            raise _cannot_be(sequence, "goes on behind its end")
        if not 0 <= token_id < vocab_size:
            raise _cannot_be(sequence, f"has token {token_id} of {vocab_size:,}")
        try:
            turn.advance(token_id, end_ids)
        except ChatserveError as error:  # its grammar allows no such token
            raise _cannot_be(sequence, f"has token {token_id}: {error.message}") from error
    return turn


def _cannot_be(sequence: Sequence, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"choice {sequence.choice} of the journal {why}; send the request from its start",
        param="journal",
    )
