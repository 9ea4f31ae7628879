"""The events of a Responses stream, in their order, and the response that they add up to.

Knows pieces of an answer; no engine, no socket, no store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from chatserve.engine.sequence import TokenEvent
from chatserve.server.answer_events import Event, deltas_of
from chatserve.server.choices import Piece
from chatserve.server.deltas import TextDelta, ToolCallDelta
from chatserve.server.derived_ids import item_id
from chatserve.server.response_object import error_of

Usage = Callable[[], Mapping[str, Any]]


class ResponseEncoder:
    """Of one response. `head`: its fixed fields; `usage` tells what has been used so far."""

    def __init__(self, head: Mapping[str, Any], usage: Usage, *, shows_logprobs: bool) -> None:
        self._head = head
        self._usage = usage
        self._shows_logprobs = shows_logprobs
        self._output: list[dict[str, Any]] = []
        self._open: _Message | _Call | None = None
        # of tokens that are no text yet
        self._logprobs: list[Any] = []
        self._sequence_number = -1
        self._reason: str | None = None
        self.response = self._response("in_progress")

    @property
    def has_ended(self) -> bool:
        return bool(self.response["status"] != "in_progress")

    def start(self) -> Iterator[Event]:
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self.response)

    def feed(self, piece: Piece, _event: TokenEvent) -> list[Event]:
        self._reason = piece.finish_reason
        self._logprobs += _logprobs(piece)
        events: list[Event] = []
        for delta in deltas_of(piece):
            if isinstance(delta, TextDelta):
                events += self._text(delta.text)
            else:
                # tokens of a call, or of the marker before it: nowhere to be told
                self._logprobs = []
                events += self._call(delta)
        return events

    def finish(self) -> Iterator[Event]:
        if self._reason != "length":
            if not self._output:
                yield from self._begin(_Message(self._next_id("msg"), self._shows_logprobs))
            yield from self._say_rest()
            # a stop text may have ended it inside a call
            is_cut = isinstance(self._open, _Call) and self._reason != "tool_calls"
            yield from self._close("incomplete" if is_cut else "completed")
            yield self._end("completed", "completed")
            return
        yield from self._say_rest()
        yield from self._close("incomplete")
        yield self._end("incomplete", "incomplete", reason="max_output_tokens")

    def cancel(self) -> Iterator[Event]:
        """The API has no event of that name: the stream ends as incomplete, the status says why."""
        yield from self._say_rest()
        yield from self._close("incomplete")
        yield self._end("incomplete", "cancelled")

    def fail(self, error: Exception) -> Iterator[Event]:
        if self._open is not None:
            self._output[-1] = self._open.item("incomplete")
            self._open = None
        yield self._end("failed", "failed", error=error)

    def _say_rest(self) -> Iterator[Event]:
        """Logprobs behind the last of a message's text."""
        if self._logprobs and isinstance(self._open, _Message):
            yield from self._text("")

    def _text(self, text: str) -> Iterator[Event]:
        logprobs, self._logprobs = self._logprobs, []
        message = self._open
        if not isinstance(message, _Message):
            message = _Message(self._next_id("msg"), self._shows_logprobs)
            yield from self._begin(message)
        message.texts.append(text)
        message.logprobs += logprobs
        yield self._event(
            "response.output_text.delta", item_id=message.id, output_index=len(self._output) - 1,
            content_index=0, delta=text, logprobs=logprobs,
        )  # fmt: skip

    def _call(self, delta: ToolCallDelta) -> Iterator[Event]:
        call = self._open
        if not isinstance(call, _Call) or call.index != delta.index:
            call = _Call(self._next_id("fc"), delta)
            yield from self._begin(call)
        if not delta.arguments:
            return
        call.arguments.append(delta.arguments)
        yield self._event(
            "response.function_call_arguments.delta", item_id=call.id,
            output_index=len(self._output) - 1, delta=delta.arguments,
        )  # fmt: skip

    def _begin(self, item: _Message | _Call) -> Iterator[Event]:
        yield from self._close("completed")
        self._open = item
        self._output.append(item.item("in_progress"))
        yield self._event(
            "response.output_item.added", output_index=len(self._output) - 1,
            item=item.item("in_progress", is_empty=True),
        )  # fmt: skip
        if isinstance(item, _Message):
            yield self._event(
                "response.content_part.added", item_id=item.id,
                output_index=len(self._output) - 1, content_index=0, part=item.part(is_empty=True),
            )  # fmt: skip

    def _close(self, status: str) -> Iterator[Event]:
        item, index = self._open, len(self._output) - 1
        if item is None:
            return
        self._open = None
        if isinstance(item, _Message):
            part = item.part()
            where = {"item_id": item.id, "output_index": index, "content_index": 0}
            yield self._event(
                "response.output_text.done", **where, text=part["text"], logprobs=item.logprobs
            )
            yield self._event("response.content_part.done", **where, part=part)
        else:
            yield self._event(
                "response.function_call_arguments.done", item_id=item.id, output_index=index,
                name=item.name, arguments="".join(item.arguments),
            )  # fmt: skip
        self._output[index] = item.item(status)
        yield self._event("response.output_item.done", output_index=index, item=self._output[index])

    def _end(
        self, name: str, status: str, *, reason: str | None = None, error: Exception | None = None
    ) -> Event:
        self.response = self._response(status, reason, error, usage=self._usage())
        return self._event(f"response.{name}", response=self.response)

    def _response(
        self,
        status: str,
        reason: str | None = None,
        error: Exception | None = None,
        usage: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None if error is None else error_of(error),
            "incomplete_details": None if reason is None else {"reason": reason},
            "output": list(self._output),
            "usage": usage,
        }

    def _next_id(self, prefix: str) -> str:
        """Of the item that is about to begin."""
        return item_id(prefix, self._head["id"], len(self._output))

    def _event(self, kind: str, **fields: Any) -> Event:
        self._sequence_number += 1
        # the number is the last of the fields: relays find it there
        return {"type": kind, **fields, "sequence_number": self._sequence_number}


class _Message:
    """An item of text that is being said."""

    def __init__(self, item_id: str, shows_logprobs: bool) -> None:
        self.id = item_id
        self.texts: list[str] = []
        self.logprobs: list[Any] = []
        self._shows_logprobs = shows_logprobs

    def part(self, *, is_empty: bool = False) -> dict[str, Any]:
        text = "" if is_empty else "".join(self.texts)
        part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": []}
        if self._shows_logprobs:
            part["logprobs"] = [] if is_empty else self.logprobs
        return part

    def item(self, status: str, *, is_empty: bool = False) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if is_empty else [self.part()],
        }


class _Call:
    """A call of a function whose arguments are being said."""

    def __init__(self, item_id: str, first: ToolCallDelta) -> None:
        self.id = item_id
        self.index = first.index
        self.name = first.name or ""
        self.arguments: list[str] = []
        self._call_id = first.call_id or ""

    def item(self, status: str, *, is_empty: bool = False) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self.name,
            "arguments": "" if is_empty else "".join(self.arguments),
        }


def _logprobs(piece: Piece) -> list[Any]:
    """In the shape of this API, where bytes are never null."""
    if piece.logprobs is None:
        return []
    return [
        {**_token(each), "top_logprobs": [_token(other) for other in each["top_logprobs"]]}
        for each in piece.logprobs["content"]
    ]


def _token(told: Mapping[str, Any]) -> dict[str, Any]:
    return {"token": told["token"], "logprob": told["logprob"], "bytes": told["bytes"] or []}
