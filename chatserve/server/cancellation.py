"""The end of an answer that somebody else asks for while its own task waits for the next token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Said = TypeVar("Said")


class Cancellation(Generic[Said]):
    """Asked for at most once. `wait_for` costs a token next to nothing: no task is made for it.

    `last`: what is still to be said then.
    """

    def __init__(self) -> None:
        self.last: Sequence[Said] = ()
        self._is_asked = False
        self._waiting: asyncio.Task[Any] | None = None

    @property
    def is_asked(self) -> bool:
        return self._is_asked

    def ask(self, last: Sequence[Said] = ()) -> None:
        """Wakes whoever is in `wait_for`; whoever is not finds out when it comes there."""
        self.last = last
        self._is_asked = True
        if self._waiting is not None:
            self._waiting.cancel()

    async def wait_for(self, items: AsyncIterator[Item]) -> Item | None:
        """The next of `items`; None at their end, or when the end was asked for."""
        if self._is_asked:
            return None
        task = self._waiting = asyncio.current_task()
        try:
            return await anext(items, None)
        except asyncio.CancelledError:
            # a task that is cancelled for another reason, too, has that to obey
            if task is None or not self.is_asked or task.uncancel():
                raise
            return None
        finally:
            self._waiting = None
