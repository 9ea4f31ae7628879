"""The journal of a stream: with it another worker can go on where this one was cut off.

A stream that has one is a row of frames each of which is followed by a block, an SSE comment of its
own that the relay keeps and takes out; `resumption.py` reads what it kept. A block begins with

    :s   how the stream began, as JSON; behind its first frames
    :t   choice and token ids of one event, perhaps more as JSON; behind its frames, if it has any
    :f   the same, of a choice's last event
    :e   the end: of what was said, or of an error that is the request's own
    :x   an error that is this worker's alone, as JSON; nothing follows
    :p   a ping that is a frame: the block says that it belongs to no event

JSON holds no line break, so nothing in a frame looks like a block. Knows no socket and no route.
"""

from __future__ import annotations

import hashlib
import hmac
from array import array
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import orjson

from chatserve.engine.sequence import TokenEvent
from chatserve.protocol.control import JOURNAL_HEADER, JournalStart
from chatserve.server.cache_salt import given_key
from chatserve.server.error_response import LOST_HERE, error_fields
from chatserve.server.preparation import Prepared, Prompt

END = b":e\n\n"
PING = b":p\n\n"
FrameOf = Callable[[int, TokenEvent], bytes]
"""The frames of an event of a choice."""


class Journal(Protocol):
    """Puts blocks behind the frames of a stream, or nothing at all."""

    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def is_resumed(self) -> bool: ...
    def begun(self, first: bytes) -> bytes: ...
    def behind(self, frame_of: FrameOf) -> FrameOf: ...
    def ended(self, last: bytes) -> bytes: ...
    def failed(self, error: Exception, last: bytes) -> bytes: ...


class NoJournal:
    """Of a stream whose worker is all it has: the frames alone."""

    headers: Mapping[str, str] = {}
    is_resumed = False

    def begun(self, first: bytes) -> bytes:
        return first

    def behind(self, frame_of: FrameOf) -> FrameOf:
        return frame_of

    def ended(self, last: bytes) -> bytes:
        return last

    def failed(self, _error: Exception, last: bytes) -> bytes:
        return last


NO_JOURNAL = NoJournal()


class WrittenJournal:
    """`start` says how the stream began; one `is_resumed` has sent its first frames elsewhere."""

    headers: Mapping[str, str] = {JOURNAL_HEADER: "1"}

    def __init__(self, start: JournalStart, *, is_resumed: bool = False) -> None:
        self._start = start
        self.is_resumed = is_resumed

    def begun(self, first: bytes) -> bytes:
        return first + b":s " + self._start.to_json() + b"\n\n"

    def behind(self, frame_of: FrameOf) -> FrameOf:
        return lambda index, event: frame_of(index, event) + unit_block(index, event)

    def ended(self, last: bytes) -> bytes:
        return last + END

    def failed(self, error: Exception, last: bytes) -> bytes:
        """`last` are the frames that tell of `error`; they are for who cannot go on elsewhere."""
        if isinstance(error, LOST_HERE):
            return b":x " + orjson.dumps({"error": error_fields(error)}) + b"\n\n"
        return last + END


def pinged(frame: bytes) -> bytes:
    """A ping that is no comment, in a stream with a journal."""
    return frame + PING


def unit_block(index: int, event: TokenEvent) -> bytes:
    """What has to be known of an event in order to say it again."""
    token_ids = event.token_ids
    is_first = event.num_generated_tokens == len(token_ids)
    if len(token_ids) == 1 and not (is_first or event.finish_reason or event.logprobs):
        return b":t %d %d\n\n" % (index, token_ids[0])
    ids = "".join(f" {token_id}" for token_id in token_ids)
    block = f":{'f' if event.is_last else 't'} {index}{ids}".encode()
    more: dict[str, Any] = {}
    if event.num_cached_tokens and is_first:
        more["cached"] = event.num_cached_tokens
    if event.logprobs:
        more["logprobs"] = [(each.logprob, each.top) for each in event.logprobs]
    return block + (b" " + orjson.dumps(more) if more else b"") + b"\n\n"


def is_wanted(headers: Mapping[str, str], control_token: str | None) -> bool:
    """Whether the controller asks for a journal: nobody else can."""
    if control_token is None or headers.get(JOURNAL_HEADER) != "1":
        return False
    given = given_key(headers)
    token = control_token.encode("utf-8", "surrogateescape")
    return given is not None and hmac.compare_digest(given, token)


def can_be_resumed(prepared: Prepared) -> bool:
    """Scores of a prompt are in no journal."""
    return prepared.is_stream and all(
        prompt.params.prompt_logprobs is None for prompt in prepared.prompts
    )


def start_of(request_id: str, created: int, fingerprint: str, prepared: Prepared) -> JournalStart:
    """Of a request whose prompts all have a seed."""
    prompts = prepared.prompts
    return JournalStart(
        id=request_id,
        created=created,
        fingerprint=fingerprint,
        prompts=[prompt_digest(prompt) for prompt in prompts],
        seeds=[prompt.params.seed or 0 for prompt in prompts],
        max_tokens=[prompt.params.max_tokens for prompt in prompts],
    )


def with_seeds(prepared: Prepared, draw_seed: Callable[[], int]) -> Prepared:
    """Each prompt with one that can be told; those that a client gave stay."""
    return replace(
        prepared,
        prompts=tuple(
            prompt
            if prompt.params.seed is not None
            else replace(prompt, params=replace(prompt.params, seed=draw_seed()))
            for prompt in prepared.prompts
        ),
    )


def prompt_digest(prompt: Prompt) -> str:
    return hashlib.sha256(array("q", prompt.ids).tobytes()).hexdigest()[:32]
