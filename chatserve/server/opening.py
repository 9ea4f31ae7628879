"""Before an answer's first token: its id, its time, and its journal, perhaps one that goes on.

Knows no route and no frame.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from chatserve.errors import InvalidRequest
from chatserve.server.contract import Engine
from chatserve.server.journal import (
    NO_JOURNAL,
    Journal,
    WrittenJournal,
    can_be_resumed,
    is_wanted,
    start_of,
    with_seeds,
)
from chatserve.server.preparation import Prepared
from chatserve.server.resumption import Resumption, going_on


@dataclass(frozen=True)
class Opening:
    """What is settled of an answer before the engine hears of it."""

    request_id: str
    created: int
    fingerprint: str
    prepared: Prepared
    journal: Journal
    resumption: Resumption | None


def open_answer(
    prefix: str,
    prepared: Prepared,
    fingerprint: str,
    engine: Engine,
    headers: Mapping[str, str],
    control_token: str | None,
    resumption: Resumption | None = None,
) -> Opening:
    """`prefix` of a new id; an answer that goes on keeps what it began with.

    Raises `CannotResume`, `InvalidRequest`.
    """
    if resumption is not None:
        return _go_on(prepared, fingerprint, resumption)
    request_id, created = prefix + uuid.uuid4().hex, int(time.time())
    journal: Journal = NO_JOURNAL
    if is_wanted(headers, control_token) and can_be_resumed(prepared):
        prepared = with_seeds(prepared, engine.draw_seed)
        journal = WrittenJournal(start_of(request_id, created, fingerprint, prepared))
    return Opening(request_id, created, fingerprint, prepared, journal, None)


def _go_on(prepared: Prepared, fingerprint: str, resumption: Resumption) -> Opening:
    start = resumption.start
    if not can_be_resumed(prepared):
        raise InvalidRequest("the request has no stream with a journal", param="body")
    prepared = going_on(prepared, start, fingerprint)
    num_sequences = len(prepared.prompts) * prepared.num_choices
    if max(resumption.begun, default=0) >= num_sequences:
        raise InvalidRequest(
            f"the journal has choice {max(resumption.begun)}, the request {num_sequences} of them",
            param="journal",
        )
    journal = WrittenJournal(start, is_resumed=True)
    return Opening(start.id, start.created, fingerprint, prepared, journal, resumption)
