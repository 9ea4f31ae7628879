"""Bugs to be found: with FAULT_PLANTED, names with commas between, a process of the rig has them.

They are what the tests of the rig are for; a test that does not find its bug proves nothing.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

from chatserve.server import edge, leases, relayed_stream, streaming

PLANTED = "FAULT_PLANTED"
_KEPT: list[Any] = []


def plant() -> None:
    """In the process that is to be ill, before anything else runs."""
    for name in filter(None, os.environ.get(PLANTED, "").split(",")):
        _BUGS[name]()


def _replace(owner: object, **values: object) -> None:
    for name, value in values.items():
        assert hasattr(owner, name), f"{owner} has no {name} to be replaced"
        setattr(owner, name, value)


def _leak() -> None:
    """Each request leaves some memory, a file and a task behind."""
    serve = edge.Edge._serve

    async def leaking(self: edge.Edge, *arguments: Any) -> None:
        _KEPT.append(os.urandom(8 * 1024))
        if len(_KEPT) % 10 == 0:
            _KEPT.append(os.open(os.devnull, os.O_RDONLY))
            _KEPT.append(asyncio.create_task(asyncio.Event().wait()))
        await serve(self, *arguments)

    _replace(edge.Edge, _serve=leaking)


def _block() -> None:
    """Now and then the loop does what takes its time."""
    serve = edge.Edge._serve
    count = 0

    async def blocking(self: edge.Edge, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count % 100 == 0:
            time.sleep(0.3)
        await serve(self, *arguments)

    _replace(edge.Edge, _serve=blocking)


def _double() -> None:
    """The worker says some tokens twice."""
    text = streaming.ChunkEncoder.text
    count = 0

    def doubled(self: streaming.ChunkEncoder, index: int, said: str) -> bytes:
        nonlocal count
        count += 1
        frame = text(self, index, said)
        return frame * 2 if count % 500 == 0 else frame

    _replace(streaming.ChunkEncoder, text=doubled)


def _keep_slots() -> None:
    """Claims on workers are not given back where an answer was cut."""
    release = leases.Lease.release
    count = 0

    def kept(self: leases.Lease) -> None:
        nonlocal count
        count += 1
        if count % 50:
            release(self)

    _replace(leases.Lease, release=kept)


def _cut() -> None:
    """The relay ends streams of lost workers without a word."""
    _replace(relayed_stream, error_event=lambda *_: b"")


_BUGS: dict[str, Callable[[], None]] = {
    "leak": _leak, "block": _block, "double": _double, "keep slots": _keep_slots, "cut": _cut,
}  # fmt: skip
