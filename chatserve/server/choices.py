"""One choice of a request, from its events to the pieces of its answer. Knows no frame, no socket.

A stream of plain text needs none of this: it goes from the event to its frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from chatserve.engine.output import ShownTokenBytes
from chatserve.engine.sequence import TokenEvent
from chatserve.errors import GenerationFailed
from chatserve.models.tool_format import ToolFormat
from chatserve.server.contract import Tokenizer
from chatserve.server.deltas import ReplyParser, TextDelta, ToolCallDelta
from chatserve.server.derived_ids import call_ids
from chatserve.server.logprobs import chat_logprobs, completion_logprobs
from chatserve.server.preparation import Prepared, Prompt
from chatserve.server.shown_tokens import Shown, ShownPrompt, ShownTokens
from chatserve.server.tool_calls import ToolCallParser


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new in an answer: text, calls, and the logprobs of the tokens shown by now."""

    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    token_ids: Sequence[int] | None = None
    prompt_token_ids: Sequence[int] | None = None
    tool_calls: Sequence[ToolCallDelta] = ()


def finish_reason_of(event: TokenEvent) -> str | None:
    """`stop` or `length`. Raises what ended the sequence otherwise."""
    if event.error is not None:
        raise event.error
    if event.finish_reason == "abort":
        raise GenerationFailed("the server stopped this answer before it was complete")
    return event.finish_reason


class Choice(Protocol):
    """Turns the events of one choice into its pieces."""

    def feed(self, event: TokenEvent) -> Piece: ...


def choices_of(prepared: Prepared, tokenizer: Tokenizer, answer_id: str) -> Sequence[Choice]:
    """One for each choice of a request; none at all where it wants nothing but text."""
    choices = _choices_of(prepared, tokenizer)
    if prepared.tool_format is not None:
        plain = choices or [PlainChoice()] * prepared.num_choices
        choices = [
            CallingChoice(each, _parser(prepared, prepared.tool_format, answer_id, choice))
            for choice, each in enumerate(plain)
        ]
    if not prepared.returns_token_ids:
        return choices
    return [
        TokenIdsChoice(each, _prompt_ids(prepared, index)) for index, each in enumerate(choices)
    ]


def _prompt_ids(prepared: Prepared, index: int) -> Sequence[int] | None:
    """None for a chat: it has one prompt, which is told beside its choices."""
    return None if prepared.is_chat else prepared.prompts[index // prepared.num_choices].ids


def _parser(
    prepared: Prepared, tool_format: ToolFormat, answer_id: str, choice: int
) -> ToolCallParser:
    ids = call_ids(answer_id, choice, is_short=tool_format.short_ids)
    return ToolCallParser(tool_format, partial(next, ids), kinds=prepared.argument_kinds)


def _choices_of(prepared: Prepared, tokenizer: Tokenizer) -> Sequence[Choice]:
    prompts = [prompt for prompt in prepared.prompts for _ in range(prepared.num_choices)]
    if prepared.shows_logprobs or prepared.is_echo:
        return [DetailedChoice(prepared, prompt, tokenizer) for prompt in prompts]
    has_more = prepared.has_usage_in_chunks or prepared.returns_token_ids
    return [PlainChoice() for _ in prompts] if has_more else []


class PlainChoice:
    """Text as it comes."""

    def feed(self, event: TokenEvent) -> Piece:
        return Piece(event.text, None, finish_reason_of(event))


class TokenIdsChoice:
    """The pieces of `choice` with the ids that were generated, also those that are no text.

    The first one has those of the prompt, if they are given.
    """

    def __init__(self, choice: Choice, prompt_ids: Sequence[int] | None) -> None:
        self._choice = choice
        self._prompt_ids = prompt_ids

    def feed(self, event: TokenEvent) -> Piece:
        prompt_ids, self._prompt_ids = self._prompt_ids, None
        return replace(
            self._choice.feed(event), token_ids=event.token_ids, prompt_token_ids=prompt_ids
        )


class DetailedChoice:
    """Text with what else was asked for of it: the prompt in front, the logprobs of its tokens."""

    def __init__(self, prepared: Prepared, prompt: Prompt, tokenizer: Tokenizer) -> None:
        params, end_ids = prompt.params, frozenset(prompt.params.stop_token_ids)
        # a grammar says itself where its answer may end
        ignores_eos = params.ignore_eos and params.grammar is None
        self._tokenizer = tokenizer
        self._encode = chat_logprobs if prepared.is_chat else completion_logprobs
        self._has_logprobs = prepared.shows_logprobs
        self._is_scored = prepared.is_echo and prepared.shows_logprobs
        self._echo = prompt.text if prepared.is_echo else ""
        self._has_told = False
        self._shown_prompt = ShownPrompt(tokenizer, prompt.ids, prompt.text)
        self._shown_tokens = ShownTokens(
            ShownTokenBytes(tokenizer, params.shown) if params.shown else tokenizer,
            end_ids if ignores_eos else end_ids | tokenizer.eos_ids,
            first_offset=len(prompt.text),
            strip_leading_space=prepared.strip_leading_space and tokenizer.strips_leading_space,
            tells_end=not prepared.is_chat,
        )

    def feed(self, event: TokenEvent) -> Piece:
        reason = finish_reason_of(event)
        text, self._echo = self._echo + event.text, ""
        shown = self._shown(event) if self._has_logprobs else []
        if not self._has_logprobs or not (shown or (reason and not self._has_told)):
            return Piece(text, None, reason)
        self._has_told = True
        return Piece(text, self._encode(self._tokenizer, shown), reason)

    def _shown(self, event: TokenEvent) -> list[Shown]:
        shown = self._shown_prompt.feed(event.prompt_logprobs) if self._is_scored else []
        if event.token_ids and self._is_scored and not self._shown_prompt.is_complete:
            raise GenerationFailed("the engine answered before it had scored the prompt")
        return shown + self._shown_tokens.feed(event)


class CallingChoice:
    """The pieces of `choice`, with calls where its text had them."""

    def __init__(self, choice: Choice, parser: ReplyParser) -> None:
        self._choice = choice
        self._parser = parser

    def feed(self, event: TokenEvent) -> Piece:
        piece = self._choice.feed(event)
        deltas = [*self._parser.feed(piece.text)]
        reason = piece.finish_reason
        if reason is not None:
            deltas += self._parser.finish(is_cut=reason == "length")
            if reason == "stop" and self._parser.has_tool_calls:
                reason = "tool_calls"
        return replace(
            piece,
            text="".join(each.text for each in deltas if isinstance(each, TextDelta)),
            finish_reason=reason,
            tool_calls=_merged([each for each in deltas if isinstance(each, ToolCallDelta)]),
        )


def _merged(deltas: Sequence[ToolCallDelta]) -> list[ToolCallDelta]:
    """One delta for each call: clients keep the last of two in a chunk."""
    merged: dict[int, ToolCallDelta] = {}
    for delta in deltas:
        if (first := merged.get(delta.index)) is not None:
            delta = replace(first, arguments=first.arguments + delta.arguments)
        merged[delta.index] = delta
    return list(merged.values())
