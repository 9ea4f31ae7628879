"""TokenEvent -> chunk -> SSE frame, and the fold of the same events into one answer.

Everything of a chunk but its text is encoded once per request: what is left per token is one JSON
string and one concatenation. No scheduling, no socket.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson

from chatserve.engine.sequence import TokenEvent
from chatserve.errors import ChatserveError, GenerationFailed
from chatserve.protocol.sse import DONE_FRAME
from chatserve.server.error_response import error_event
from chatserve.server.generation import Generation

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


class ChunkEncoder:
    """The SSE frames of one request."""

    def __init__(self, head: ReplyHead, num_choices: int, *, includes_usage: bool) -> None:
        self._head = head
        self._includes_usage = includes_usage
        self._pieces = [self._split(index) for index in range(num_choices)]

    def first(self, index: int) -> bytes:
        """The role of choice `index`; text completions have none."""
        if not self._head.is_chat:
            return b""
        return self._frame(self._choice(index, {"role": "assistant", "content": ""}))

    def text(self, index: int, text: str) -> bytes:
        before, after = self._pieces[index]
        return before + orjson.dumps(text) + after

    def finish(self, index: int, reason: str) -> bytes:
        return self._frame(self._choice(index, {} if self._head.is_chat else "", reason))

    def usage(self, usage: dict[str, Any]) -> bytes:
        return b"data: " + orjson.dumps(self._chunk([], usage)) + b"\n\n"

    def _split(self, index: int) -> tuple[bytes, bytes]:
        content = {"content": HOLE} if self._head.is_chat else HOLE
        before, _, after = self._frame(self._choice(index, content)).partition(ENCODED_HOLE)
        return before, after

    def _choice(self, index: int, content: Any, reason: str | None = None) -> dict[str, Any]:
        return {
            "index": index,
            "delta" if self._head.is_chat else "text": content,
            "logprobs": None,
            "finish_reason": reason,
        }

    def _frame(self, choice: dict[str, Any]) -> bytes:
        return b"data: " + orjson.dumps(self._chunk([choice], None)) + b"\n\n"

    def _chunk(self, choices: list[Any], usage: dict[str, Any] | None) -> dict[str, Any]:
        chunk = {**self._head.to_dict(is_chunk=True), "choices": choices}
        return {**chunk, "usage": usage} if self._includes_usage else chunk


async def stream_frames(
    generation: Generation, encoder: ChunkEncoder, *, includes_usage: bool
) -> AsyncGenerator[bytes]:
    """The answer as SSE frames, one write per event.

    It ends with `[DONE]` when it is complete, with an error event when it is not.
    """
    if first := b"".join(encoder.first(index) for index in range(generation.num_sequences)):
        yield first
    try:
        async with aclosing(generation.events()) as events:
            async for index, event in events:
                if frame := _event_frame(encoder, index, event):
                    yield frame
    except ChatserveError as error:
        yield error_event(error)
        return
    except Exception as error:  # the status is out: the error can only be told inside the stream
        logger.exception("%s failed", generation.request_id)
        yield error_event(error)
        return
    tail = encoder.usage(usage_of(generation)) if includes_usage else b""
    yield tail + DONE_FRAME


def _event_frame(encoder: ChunkEncoder, index: int, event: TokenEvent) -> bytes:
    reason = _finish_reason(event)
    frame = encoder.text(index, event.text) if event.text else b""
    return frame + encoder.finish(index, reason) if reason else frame


def _finish_reason(event: TokenEvent) -> str | None:
    """`stop` or `length`. Raises what ended the sequence otherwise."""
    if event.error is not None:
        raise event.error
    if event.finish_reason == "abort":
        raise GenerationFailed("the server stopped this answer before it was complete")
    return event.finish_reason


async def fold(generation: Generation, head: ReplyHead) -> dict[str, Any]:
    """The whole answer: the same events, their texts joined.

    Raises the error of the first sequence that fails.
    """
    texts: list[list[str]] = [[] for _ in range(generation.num_sequences)]
    reasons: list[str | None] = [None] * generation.num_sequences
    async with aclosing(generation.events()) as events:
        async for index, event in events:
            reasons[index] = _finish_reason(event)
            texts[index].append(event.text)
    choices = [
        _whole_choice(head, index, "".join(parts), reasons[index])
        for index, parts in enumerate(texts)
    ]
    return {**head.to_dict(is_chunk=False), "choices": choices, "usage": usage_of(generation)}


def _whole_choice(head: ReplyHead, index: int, text: str, reason: str | None) -> dict[str, Any]:
    content: dict[str, Any] = (
        {"message": {"role": "assistant", "content": text}} if head.is_chat else {"text": text}
    )
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}


def usage_of(generation: Generation) -> dict[str, Any]:
    """Token counts; a prompt counts once, however many choices continue it."""
    num_prompt_tokens = generation.prepared.num_prompt_tokens
    num_generated_tokens = generation.num_generated_tokens
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated_tokens,
        "total_tokens": num_prompt_tokens + num_generated_tokens,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }
