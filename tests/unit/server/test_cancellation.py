"""The end of a wait that somebody else asks for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from chatserve.server.cancellation import Cancellation


async def items(waiting: asyncio.Event) -> AsyncGenerator[int]:
    yield 1
    waiting.set()
    await asyncio.Event().wait()


def test_a_wait_is_ended_and_the_task_goes_on() -> None:
    async def main() -> list[int | None]:
        cancellation, waiting = Cancellation[int](), asyncio.Event()

        async def read() -> list[int | None]:
            source = items(waiting)
            got = [await cancellation.wait_for(source), await cancellation.wait_for(source)]
            # the task is not cancelled any more: it may wait for other things
            await asyncio.sleep(0)
            return got

        task = asyncio.create_task(read())
        await waiting.wait()
        cancellation.ask()
        return await task

    assert asyncio.run(main()) == [1, None]


def test_what_was_asked_for_before_the_wait_counts() -> None:
    async def main() -> None:
        cancellation = Cancellation[int]()
        cancellation.ask()
        assert await cancellation.wait_for(items(asyncio.Event())) is None

    asyncio.run(main())


def test_the_end_of_the_items() -> None:
    async def none() -> AsyncGenerator[int]:
        for item in ():
            yield item

    async def main() -> None:
        assert await Cancellation[int]().wait_for(none()) is None

    asyncio.run(main())


@pytest.mark.parametrize("is_asked", [False, True])
def test_a_task_that_is_cancelled_otherwise_ends(is_asked: bool) -> None:
    async def main() -> None:
        cancellation, waiting = Cancellation[int](), asyncio.Event()
        source = items(waiting)
        assert await cancellation.wait_for(source) == 1
        task = asyncio.create_task(cancellation.wait_for(source))
        await waiting.wait()
        if is_asked:
            cancellation.ask()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
