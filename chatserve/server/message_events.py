"""The events of an Anthropic stream, in their order, and the message that they add up to.

Knows pieces of an answer; no engine, no socket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic_core import from_json
from sse_starlette.event import ServerSentEvent as OutgoingEvent

from chatserve.engine.sequence import TokenEvent
from chatserve.errors import ChatserveError
from chatserve.protocol.anthropic import MESSAGES_PATH
from chatserve.server.answer_events import Event, deltas_of
from chatserve.server.choices import Piece
from chatserve.server.deltas import TextDelta, ToolCallDelta
from chatserve.server.derived_ids import item_id
from chatserve.server.error_dialects import dialect_of
from chatserve.server.error_response import error_fields, status_of
from chatserve.server.generation import Generation
from chatserve.server.journal import pinged
from chatserve.server.stop_sequence import StopSequence

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

Usage = Callable[[], Mapping[str, Any]]


def ping_event() -> OutgoingEvent:
    return OutgoingEvent(event="ping", data='{"type":"ping"}', sep="\n")


class JournaledPing(OutgoingEvent):
    """The same, followed by its block."""

    def __init__(self) -> None:
        super().__init__()
        self._frame = pinged(ping_event().encode())

    def encode(self) -> bytes:
        return self._frame


class MessageEncoder:
    """Of one message. `usage` tells what has been used so far; `stop` which stop string was met."""

    def __init__(
        self, message_id: str, model: str, fingerprint: str, usage: Usage, stop: StopSequence
    ) -> None:
        self._head = {
            "id": message_id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._usage = usage
        self._stop = stop
        self._content: list[dict[str, Any]] = []
        self._texts: list[str] = []
        self._call_index: int | None = None
        self._is_open = False
        self._reason: str | None = None

    @property
    def message(self) -> dict[str, Any]:
        """The whole of it, once it has ended."""
        return {**self._head, "content": self._content, **self._end(), "usage": self._usage()}

    def start(self) -> Iterator[Event]:
        # what is cached is known with the first token
        usage = {**self._usage(), "cache_read_input_tokens": None}
        end = {"stop_reason": None, "stop_sequence": None}
        message: dict[str, Any] = {**self._head, "content": [], **end, "usage": usage}
        yield {"type": "message_start", "message": message}

    def feed(self, piece: Piece, event: TokenEvent) -> list[Event]:
        self._stop.feed(event)
        self._reason = piece.finish_reason
        events: list[Event] = []
        for delta in deltas_of(piece):
            events += self._text(delta.text) if isinstance(delta, TextDelta) else self._call(delta)
        return events

    def finish(self) -> Iterator[Event]:
        yield from self._close()
        yield {"type": "message_delta", "delta": self._end(), "usage": self._usage()}
        yield {"type": "message_stop"}

    def fail(self, error: Exception) -> Iterator[Event]:
        status = status_of(error)[0] if isinstance(error, ChatserveError) else 500
        yield dialect_of(MESSAGES_PATH).body(error_fields(error), status)

    def _end(self) -> dict[str, Any]:
        found = self._stop.found
        if found is not None and self._reason == "stop":
            return {"stop_reason": "stop_sequence", "stop_sequence": found}
        return {"stop_reason": _STOP_REASONS[self._reason or "stop"], "stop_sequence": None}

    def _text(self, text: str) -> Iterator[Event]:
        if not self._is_open or self._call_index is not None:
            yield from self._begin({"type": "text", "text": ""}, None)
        self._texts.append(text)
        yield self._delta({"type": "text_delta", "text": text})

    def _call(self, delta: ToolCallDelta) -> Iterator[Event]:
        if not self._is_open or self._call_index != delta.index:
            call_id = delta.call_id or item_id("toolu", self._head["id"], delta.index)
            block = {"type": "tool_use", "id": call_id, "name": delta.name or "", "input": {}}
            yield from self._begin(block, delta.index)
        if delta.arguments:
            self._texts.append(delta.arguments)
            yield self._delta({"type": "input_json_delta", "partial_json": delta.arguments})

    def _begin(self, block: dict[str, Any], call_index: int | None) -> Iterator[Event]:
        yield from self._close()
        self._is_open, self._call_index = True, call_index
        self._content.append(block)
        # a copy: what the block will have become is not known yet
        yield {"type": "content_block_start", "index": self._index, "content_block": {**block}}

    def _close(self) -> Iterator[Event]:
        if not self._is_open:
            return
        said, block = "".join(self._texts), self._content[-1]
        self._texts.clear()
        self._is_open = False
        if block["type"] == "text":
            block["text"] = said
        else:
            block["input"] = _arguments(said)
        yield {"type": "content_block_stop", "index": self._index}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    @property
    def _index(self) -> int:
        return len(self._content) - 1


def _arguments(said: str) -> dict[str, Any]:
    """Of a call that the length of the answer has cut: what Anthropic's client makes of the pieces
    of a stream, each value that is complete."""
    try:
        arguments = from_json(said or "{}", allow_partial=True)
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


def usage_of(generation: Generation) -> dict[str, Any]:
    """What came from the cache is counted apart: the prompt is the sum of all three."""
    num_cached = generation.num_cached_tokens
    return {
        "input_tokens": generation.prepared.num_prompt_tokens - num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
        "output_tokens": generation.num_generated_tokens,
    }
