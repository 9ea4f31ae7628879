"""The relay's part by hand: streams with a journal, cut into units, and sent on to a worker."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx

from chatserve.protocol.control import JOURNAL_HEADER, RESUME_PATH, bearer

TOKEN = "control-token-of-tests"
HEADERS = {JOURNAL_HEADER: "1", **bearer(TOKEN)}


class Unit(NamedTuple):
    """The frames of one write, and the block behind them."""

    frames: bytes
    block: bytes


def without_times(units: Sequence[Unit]) -> list[Unit]:
    """A response is completed when it is."""
    return [
        Unit(re.sub(rb'"completed_at":\d+', b'"completed_at":0', unit.frames), unit.block)
        for unit in units
    ]


def units_of(stream: bytes) -> list[Unit]:
    """Raises for bytes that are not frames and blocks; frames without a block come last."""
    units, frames = [], b""
    *events, rest = stream.split(b"\n\n")
    assert not rest, rest
    for event in events:
        event += b"\n\n"
        if event.startswith(b":") and not event.startswith(b": "):
            units.append(Unit(frames, event))
            frames = b""
        elif not event.startswith(b": "):
            frames += event
    return [*units, *([Unit(frames, b"")] if frames else [])]


def stream(url: str, path: str, body: Any, headers: dict[str, str] = HEADERS) -> list[Unit]:
    """All of a stream with a journal."""
    reply = httpx.post(url + path, json=body, headers=headers, timeout=60, verify=False)
    assert reply.status_code == 200, reply.text
    assert reply.headers[JOURNAL_HEADER] == "1"
    return units_of(reply.content)


def resume_body(path: str, body: Any, units: Sequence[Unit]) -> dict[str, str]:
    blocks = b"".join(unit.block for unit in units if unit.block[:2] in (b":s", b":t", b":f"))
    return {"path": path, "body": json.dumps(body), "journal": blocks.decode()}


def resume(url: str, path: str, body: Any, units: Sequence[Unit]) -> list[Unit]:
    """What comes behind `units`; the first of it is the start again."""
    return stream(url, RESUME_PATH, resume_body(path, body, units))
