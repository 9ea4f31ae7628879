"""Threads for what takes too long for the event loop that serves every stream: templates,
tokenizers, large bodies. Knows no request."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar, TypeVarTuple

NUM_THREADS = 2

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


class PreparationPool:
    """Runs work off the event loop while it is `open`."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        with ThreadPoolExecutor(NUM_THREADS, "prepare") as self._threads:
            yield

    async def run(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """`work(*arguments)` in a thread, with the context variables of the task that asks."""
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: context.run(work, *arguments))
