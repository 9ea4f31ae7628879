"""From the journal of a stream to what a worker has to know in order to go on with it.

Whoever sends one holds the control token; it is read as if it came from anybody. Knows no engine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from chatserve.engine.sequence import Begun, TokenLogprobs
from chatserve.errors import CannotResume, InvalidRequest
from chatserve.protocol.control import JournalStart, parse
from chatserve.server.journal import prompt_digest
from chatserve.server.preparation import Prepared

_UNIT = re.compile(r":([tf]) ([0-9]{1,4})((?: [0-9]{1,10})*)(?: (\{.*\}))?")

UNSAID = Begun((), ())
"""Of a choice whose turn had not come."""


@dataclass(frozen=True)
class Resumption:
    """A journal that was read. `order`: whose events came, one after the other."""

    start: JournalStart
    begun: Mapping[int, Begun]
    order: Sequence[int]


def read_journal(text: str) -> Resumption:
    """Raises `InvalidRequest` for what no worker has written."""
    first, *rest = text.split("\n\n")
    if not first.startswith(":s ") or not rest or rest.pop():
        raise _malformed("it does not begin with :s, or its last block has no end")
    start = parse(JournalStart, first[3:].encode())
    said: dict[int, _Said] = {}
    order = []
    for number, block in enumerate(rest, 2):
        match = _UNIT.fullmatch(block)
        if match is None:
            raise _malformed(f"block {number} is {block[:50]!r}")
        kind, index, ids, more = match.groups()
        try:
            said.setdefault(int(index), _Said()).add(kind, ids, orjson.loads(more or "{}"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _malformed(f"block {number} is {block[:50]!r}: {error}") from error
        order.append(int(index))
    return Resumption(start, {index: each.begun() for index, each in said.items()}, order)


class _Said:
    """What the units of one choice add up to."""

    def __init__(self) -> None:
        self._units: list[tuple[int, ...]] = []
        self._logprobs: list[tuple[TokenLogprobs, ...]] = []
        self._num_cached_tokens = 0
        self._has_ended = False

    def add(self, kind: str, ids: str, more: dict[str, Any]) -> None:
        if self._has_ended:
            raise ValueError("the choice has ended before")
        token_ids = tuple(map(int, ids.split()))
        logprobs = tuple(
            TokenLogprobs(token_id, _number(own), tuple((int(id_), _number(p)) for id_, p in top))
            for token_id, (own, top) in zip(token_ids, more.get("logprobs", ()), strict=False)
        )
        if logprobs and len(logprobs) != len(token_ids):
            raise ValueError("not all tokens have logprobs")
        num_cached_tokens = int(more.get("cached", self._num_cached_tokens))
        if num_cached_tokens < 0:
            raise ValueError("fewer than no tokens were cached")
        self._units.append(token_ids)
        self._logprobs.append(logprobs)
        self._num_cached_tokens = num_cached_tokens
        self._has_ended = kind == "f"

    def begun(self) -> Begun:
        return Begun(
            tuple(self._units), tuple(self._logprobs), self._num_cached_tokens, self._has_ended
        )


def _number(value: float | None) -> float:
    """JSON has no infinity."""
    return -math.inf if value is None else float(value)


def _malformed(how: str) -> InvalidRequest:
    return InvalidRequest(f"this is no journal of a stream: {how}", param="journal")


def going_on(prepared: Prepared, start: JournalStart, fingerprint: str) -> Prepared:
    """The request as the worker understood it that began to answer.

    Raises `CannotResume` where this worker understands another one.
    """
    if fingerprint != start.fingerprint:
        raise CannotResume(
            f"the answer was begun by {start.fingerprint}, {fingerprint} is served here; send it "
            "to a worker with the same fingerprint"
        )
    prompts = prepared.prompts
    if [prompt_digest(prompt) for prompt in prompts] != start.prompts:
        raise CannotResume(
            "the request has become another prompt: its template shows the date, or this worker "
            "holds a context of another length; send it again from the start"
        )
    if not len(prompts) == len(start.seeds) == len(start.max_tokens):
        raise _malformed(f"seeds or limits are not those of {len(prompts)} prompts")
    return replace(
        prepared,
        prompts=tuple(
            replace(prompt, params=replace(prompt.params, seed=seed, max_tokens=max_tokens))
            for prompt, seed, max_tokens in zip(prompts, start.seeds, start.max_tokens, strict=True)
        ),
    )
