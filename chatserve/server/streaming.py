"""TokenEvent -> chunk -> SSE frame, and the fold of the same events into one answer.

Everything of a chunk but its text is encoded once per request: what is left per token is one JSON
string and one concatenation. No scheduling, no socket.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import orjson

from chatserve.engine.sequence import TokenEvent
from chatserve.errors import ChatserveError
from chatserve.protocol.sse import DONE_FRAME
from chatserve.server.choices import Choice, Piece, PlainChoice, finish_reason_of
from chatserve.server.deltas import ToolCallDelta
from chatserve.server.error_response import error_event
from chatserve.server.generation import Generation
from chatserve.server.journal import NO_JOURNAL, FrameOf, Journal
from chatserve.server.truncation import dropped_usage

logger = logging.getLogger(__name__)

# stands in for the text while the rest of a chunk is encoded; no JSON can hold it unescaped
HOLE = "\x00"
ENCODED_HOLE = orjson.dumps(HOLE)


@dataclass(frozen=True)
class ReplyHead:
    """The fields that every chunk and the whole answer of one request share."""

    request_id: str
    created: int
    model: str
    fingerprint: str
    is_chat: bool

    def to_dict(self, *, is_chunk: bool) -> dict[str, Any]:
        chat_kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        return {
            "id": self.request_id,
            "object": chat_kind if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class Ranker(Protocol):
    """`chatserve.server.ranker.Ranker`, as `fold` uses it. `num_tokens`: what it has read."""

    @property
    def num_tokens(self) -> int: ...
    async def scores(self, texts: Sequence[str]) -> list[float]: ...


UsageNow = Callable[[], dict[str, Any]]


def chunk_encoder(generation: Generation, head: ReplyHead) -> ChunkEncoder:
    prepared = generation.prepared
    return ChunkEncoder(
        head,
        generation.num_sequences,
        includes_usage=prepared.includes_usage,
        usage_now=partial(usage_of, generation) if prepared.has_usage_in_chunks else None,
        may_call=prepared.tool_format is not None,
        prompt_ids=prepared.prompts[0].ids if prepared.returns_token_ids else None,
    )


class ChunkEncoder:
    """The SSE frames of one request. `usage_now`: what every chunk says of usage so far.

    `may_call`: there may be calls in the place of text. `prompt_ids` of a chat go out with its
    roles.
    """

    def __init__(
        self,
        head: ReplyHead,
        num_choices: int,
        *,
        includes_usage: bool,
        usage_now: UsageNow | None = None,
        may_call: bool = False,
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        self._head = head
        self._includes_usage = includes_usage
        self._usage_now = usage_now
        self._may_call = may_call
        self._prompt_ids = prompt_ids
        self._pieces = [self._split(index) for index in range(num_choices)]

    def first(self, index: int) -> bytes:
        """The role of choice `index`; text completions have none."""
        if not self._head.is_chat:
            return b""
        # null and a text are together that text to clients that add up
        content = None if self._may_call else ""
        role = {"role": "assistant", "content": content, "refusal": None}
        return self._frame(self._choice(index, role), **_prompt_token_ids(self._prompt_ids))

    def text(self, index: int, text: str) -> bytes:
        before, after = self._pieces[index]
        return before + orjson.dumps(text) + after

    def finish(self, index: int, reason: str) -> bytes:
        return self._frame(self._choice(index, self._content(""), reason))

    def detailed(self, index: int, piece: Piece) -> bytes:
        """A chunk with all that `piece` has, and one more where it is the last."""
        frame = b""
        if (
            piece.text or piece.logprobs or piece.token_ids or piece.tool_calls
            or piece.prompt_token_ids
        ):  # fmt: skip
            content = self._content(piece.text)
            if piece.tool_calls:
                content = {
                    **content,
                    "tool_calls": [_call_delta(each) for each in piece.tool_calls],
                }
            choice = self._choice(index, content, None, piece.logprobs)
            more = _token_ids(piece.token_ids) | _prompt_token_ids(piece.prompt_token_ids)
            frame = self._frame(choice | more)
        return frame + self.finish(index, piece.finish_reason) if piece.finish_reason else frame

    def usage(self, usage: dict[str, Any]) -> bytes:
        return b"data: " + orjson.dumps(self._chunk([], usage)) + b"\n\n"

    def _split(self, index: int) -> tuple[bytes, bytes]:
        before, _, after = self._frame(self._choice(index, self._content(HOLE))).partition(
            ENCODED_HOLE
        )
        return before, after

    def _content(self, text: str) -> Any:
        if not self._head.is_chat:
            return text
        return {"content": text} if text else {}

    def _choice(
        self, index: int, content: Any, reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta" if self._head.is_chat else "text": content,
            "logprobs": logprobs,
            "finish_reason": reason,
        }

    def _frame(self, choice: dict[str, Any], **more: Any) -> bytes:
        usage = self._usage_now() if self._usage_now else None
        return b"data: " + orjson.dumps(self._chunk([choice], usage) | more) + b"\n\n"

    def _chunk(self, choices: list[Any], usage: dict[str, Any] | None) -> dict[str, Any]:
        chunk = {**self._head.to_dict(is_chunk=True), "choices": choices}
        return {**chunk, "usage": usage} if self._includes_usage else chunk


def _call_delta(delta: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": delta.arguments}
    if delta.call_id is None:
        return {"index": delta.index, "function": function}
    function = {"name": delta.name, **function}
    return {"index": delta.index, "id": delta.call_id, "type": "function", "function": function}


def _token_ids(ids: Sequence[int] | None) -> dict[str, Any]:
    """Nothing where they were not asked for."""
    return {} if ids is None else {"token_ids": ids}


def _prompt_token_ids(ids: Sequence[int] | None) -> dict[str, Any]:
    return {} if ids is None else {"prompt_token_ids": ids}


async def stream_frames(
    generation: Generation,
    encoder: ChunkEncoder,
    choices: Sequence[Choice] = (),
    journal: Journal = NO_JOURNAL,
) -> AsyncGenerator[bytes]:
    """The answer as SSE frames, one write per event; `choices` are for more than plain text.

    It ends with `[DONE]` when it is complete, with an error event when it is not.
    """
    frame_of = journal.behind(_frame_maker(encoder, choices))
    heads = range(0 if journal.is_resumed else generation.num_sequences)
    if first := journal.begun(b"".join(map(encoder.first, heads))):
        yield first
    try:
        async with aclosing(generation.events()) as events:
            async for index, event in events:
                if frame := frame_of(index, event):
                    yield frame
    except ChatserveError as error:
        yield journal.failed(error, error_event(error))
        return
    except Exception as error:  # the status is out: the error can only be told inside the stream
        logger.exception("%s failed", generation.request_id)
        yield journal.failed(error, error_event(error))
        return
    tail = encoder.usage(usage_of(generation)) if generation.prepared.includes_usage else b""
    yield journal.ended(tail + DONE_FRAME)


def _frame_maker(encoder: ChunkEncoder, choices: Sequence[Choice]) -> FrameOf:
    if choices:
        return lambda index, event: encoder.detailed(index, choices[index].feed(event))
    return partial(_text_frame, encoder)


def _text_frame(encoder: ChunkEncoder, index: int, event: TokenEvent) -> bytes:
    reason = finish_reason_of(event)
    frame = encoder.text(index, event.text) if event.text else b""
    return frame + encoder.finish(index, reason) if reason else frame


async def fold(
    generation: Generation,
    head: ReplyHead,
    choices: Sequence[Choice] = (),
    ranker: Ranker | None = None,
) -> dict[str, Any]:
    """The whole answer: the same events, their pieces joined; in the order of `ranker`'s scores.

    Raises the error of the first sequence that fails.
    """
    choices = choices or [PlainChoice()] * generation.num_sequences
    answers = [_Answer() for _ in choices]
    async with aclosing(generation.events()) as events:
        async for index, event in events:
            answers[index].add(choices[index].feed(event), event)
    prepared = generation.prepared
    if ranker is not None:
        prompts = [prompt for prompt in prepared.prompts for _ in range(prepared.num_choices)]
        echoed = [len(prompt.text) if prepared.is_echo else 0 for prompt in prompts]
        texts = [answer.text[start:] for answer, start in zip(answers, echoed, strict=True)]
        for answer, score in zip(answers, await ranker.scores(texts), strict=True):
            answer.score = score
    num_kept = prepared.num_choices - prepared.num_dropped
    chosen = [
        answer
        for start in range(0, len(answers), prepared.num_choices)
        for answer in _best(answers[start : start + prepared.num_choices], num_kept)
    ]
    may_call = prepared.tool_format is not None
    answered = [
        answer.to_choice(head, index, may_call=may_call) for index, answer in enumerate(chosen)
    ]
    usage = usage_of(generation)
    if ranker is not None:
        usage["ranking_tokens"] = ranker.num_tokens
    reply = {**head.to_dict(is_chunk=False), "choices": answered, "usage": usage}
    if prepared.returns_token_ids:
        # vLLM's places: a chat has one prompt, a completion may have several
        for choice in [reply] if head.is_chat else answered:
            place = choice.get("index", 0) // num_kept
            choice["prompt_token_ids"] = prepared.prompts[place].ids
    return reply


@dataclass
class _Answer:
    """What one sequence has said so far."""

    texts: list[str] = field(default_factory=list)
    calls: list[list[ToolCallDelta]] = field(default_factory=list)
    logprobs: dict[str, Any] | None = None
    reason: str | None = None
    token_ids: list[int] | None = None
    sum_logprobs: float = 0.0
    num_tokens: int = 0
    score: float | None = None

    def add(self, piece: Piece, event: TokenEvent) -> None:
        self.texts.append(piece.text)
        self.reason = piece.finish_reason
        for delta in piece.tool_calls:
            if delta.call_id is not None:
                self.calls.append([])
            self.calls[delta.index].append(delta)
        if piece.token_ids is not None:
            if self.token_ids is None:
                self.token_ids = []
            self.token_ids += piece.token_ids
        self.sum_logprobs += sum(each.logprob for each in event.logprobs)
        self.num_tokens += len(event.logprobs)
        if piece.logprobs is None:
            return
        if self.logprobs is None:
            self.logprobs = piece.logprobs
            return
        for name, values in piece.logprobs.items():
            if values is not None:
                self.logprobs[name] += values

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def rank(self) -> float:
        """Higher is better: what a reward model says, else the tokens' mean logprob."""
        return self.sum_logprobs / max(1, self.num_tokens) if self.score is None else self.score

    def to_choice(self, head: ReplyHead, index: int, *, may_call: bool) -> dict[str, Any]:
        text = self.text
        content: dict[str, Any] = {"text": text}
        if head.is_chat:
            said = text or None if may_call else text
            content = {"message": {"role": "assistant", "content": said, "refusal": None}}
        if self.calls:
            content["message"]["tool_calls"] = self._whole_calls()
        return {
            "index": index, **content, "logprobs": self.logprobs, "finish_reason": self.reason,
            **_token_ids(self.token_ids), **({} if self.score is None else {"score": self.score}),
        }  # fmt: skip

    def _whole_calls(self) -> list[dict[str, Any]]:
        return [
            {
                "id": first.call_id,
                "type": "function",
                "function": {
                    "name": first.name,
                    "arguments": "".join(each.arguments for each in (first, *rest)),
                },
            }
            for first, *rest in self.calls
        ]


def _best(answers: Sequence[_Answer], count: int) -> Sequence[_Answer]:
    """The `count` best, the best first, where there are more or a reward model has ranked them."""
    if count >= len(answers) and answers[0].score is None:
        return answers
    return sorted(answers, key=lambda answer: -answer.rank)[:count]


def usage_of(generation: Generation) -> dict[str, Any]:
    """Token counts; a prompt counts once, however many choices continue it."""
    num_prompt_tokens = generation.prepared.num_prompt_tokens
    num_generated_tokens = generation.num_generated_tokens
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated_tokens,
        "total_tokens": num_prompt_tokens + num_generated_tokens,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
        **dropped_usage(generation.prepared.rolled),
    }
