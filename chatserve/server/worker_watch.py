"""The only timer over workers: who waits for one that says nothing any more is told in time."""

from __future__ import annotations

import asyncio
import contextlib
from typing import NoReturn

from chatserve.server.registry import WorkerRegistry

# timers may come a little early
_SLACK_S = 0.01


async def watch_workers(registry: WorkerRegistry) -> NoReturn:
    """Sleeps until a worker comes, goes, or may have been silent for too long."""
    with registry.changes() as change:
        while True:
            change.clear()
            delay_s = registry.check()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    change.wait(), None if delay_s is None else delay_s + _SLACK_S
                )
