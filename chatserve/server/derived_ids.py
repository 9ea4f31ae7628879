"""Ids inside an answer: functions of its own id and a place, so that whoever goes on with it says
the same."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterator
from itertools import count

_SIGNS = string.ascii_letters + string.digits
_NUM_SIGNS = 24
_NUM_SHORT = 9


def item_id(prefix: str, answer_id: str, place: int) -> str:
    """Of number `place` of what an answer consists of."""
    return f"{prefix}_{_digest(answer_id, prefix, place).hex()[:32]}"


def call_ids(answer_id: str, choice: int, *, is_short: bool) -> Iterator[str]:
    """Of the calls of a choice, one after the other. `is_short`: nine letters and digits."""
    prefix, length = ("", _NUM_SHORT) if is_short else ("call_", _NUM_SIGNS)
    for number in count():
        digest = _digest(answer_id, "call", choice, number)
        yield prefix + "".join(_SIGNS[byte % len(_SIGNS)] for byte in digest[:length])


def _digest(answer_id: str, kind: str, *place: int) -> bytes:
    return hashlib.sha256(" ".join([answer_id, kind, *map(str, place)]).encode()).digest()
