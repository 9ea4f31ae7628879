"""One answer as the events of an API that has its own: from the engine to frames, or folded.

The APIs differ in their encoders; what they share is here. Knows no field of any event.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import orjson

from chatserve.engine.sequence import TokenEvent
from chatserve.errors import ChatserveError
from chatserve.server.cancellation import Cancellation
from chatserve.server.choices import Choice, Piece, PlainChoice, choices_of
from chatserve.server.contract import Tokenizer
from chatserve.server.deltas import Delta, TextDelta
from chatserve.server.generation import Generation
from chatserve.server.journal import NO_JOURNAL, Journal
from chatserve.server.resumption import Resumption

logger = logging.getLogger(__name__)

Event = Mapping[str, Any]
"""What goes into one frame; its `type` is its name, too."""


class Encoder(Protocol):
    """Turns the pieces of an answer into events, and keeps what the whole answer is made of."""

    def start(self) -> Iterable[Event]: ...

    def feed(self, piece: Piece, event: TokenEvent) -> Iterable[Event]: ...

    def finish(self) -> Iterable[Event]:
        """After the last piece."""
        ...

    def fail(self, error: Exception) -> Iterable[Event]: ...


def deltas_of(piece: Piece) -> Sequence[Delta]:
    """Text comes before the calls that came with it."""
    text = [TextDelta(piece.text)] if piece.text else []
    return [*text, *piece.tool_calls]


def choice_of(generation: Generation, tokenizer: Tokenizer) -> Choice:
    """The only choice of a request."""
    return next(
        iter(choices_of(generation.prepared, tokenizer, generation.request_id)), PlainChoice()
    )


async def _events_of(
    generation: Generation, cancellation: Cancellation[Event]
) -> AsyncGenerator[TokenEvent]:
    """What the engine says, to its end or the one asked for. Raises what ended it otherwise."""
    async with aclosing(generation.events()) as events:
        while (item := await cancellation.wait_for(events)) is not None:
            yield item[1]


async def replay(
    generation: Generation, choice: Choice, encoder: Encoder, resumption: Resumption | None
) -> None:
    """Bring `encoder` to where an answer was cut; its client has the events already."""
    if resumption is not None:
        list(encoder.start())
        await generation.replay(
            resumption, lambda _, event: list(encoder.feed(choice.feed(event), event))
        )


async def stream_answer(
    generation: Generation,
    choice: Choice,
    encoder: Encoder,
    cancellation: Cancellation[Event],
    journal: Journal = NO_JOURNAL,
) -> AsyncGenerator[bytes]:
    """The answer as frames, one write for each step; an error is its last event.

    What was said before is in `encoder` already, with a `journal` that goes on.
    """
    frames_of = journal.behind(lambda _, event: frames(encoder.feed(choice.feed(event), event)))
    yield journal.begun(b"" if journal.is_resumed else frames(encoder.start()))
    try:
        async with aclosing(_events_of(generation, cancellation)) as events:
            async for event in events:
                if data := frames_of(0, event):
                    yield data
        yield journal.ended(
            frames(cancellation.last if cancellation.is_asked else encoder.finish())
        )
    except ChatserveError as error:
        yield journal.failed(error, frames(encoder.fail(error)))
    except Exception as error:  # the status is out: the error can only be told inside the stream
        logger.exception("%s failed", generation.request_id)
        yield journal.failed(error, frames(encoder.fail(error)))


async def fold_answer(generation: Generation, choice: Choice, encoder: Encoder) -> None:
    """The same without frames: what the answer has become is in `encoder`. Raises its error."""
    async with aclosing(generation.events()) as events:
        async for _, event in events:
            encoder.feed(choice.feed(event), event)
    for _ in encoder.finish():
        pass


def frames(events: Iterable[Event]) -> bytes:
    return b"".join(
        b"event: " + event["type"].encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"
        for event in events
    )
