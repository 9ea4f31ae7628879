"""Work ends when its client leaves, and only then."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from chatserve.server.disconnect import nobody_listens, until_disconnect


class Client:
    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}


def test_499_stands_in_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "chatserve")
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    assert nobody_listens(Request(scope)).body == b""
    assert caplog.messages == ["499 POST /v1/completions: the client left, request=-"]


def test_result_is_returned() -> None:
    async def work() -> int:
        return 5

    assert asyncio.run(until_disconnect(Client().receive, work())) == 5


def test_error_is_raised() -> None:
    async def work() -> int:
        raise KeyError

    with pytest.raises(KeyError):
        asyncio.run(until_disconnect(Client().receive, work()))


def test_work_is_cancelled_and_has_cleaned_up_when_the_client_leaves() -> None:
    cleaned: list[int] = []

    async def main() -> None:
        client = Client()

        async def work() -> None:
            try:
                client.left.set()
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                cleaned.append(1)

        await until_disconnect(client.receive, work())

    with pytest.raises(ClientDisconnect):
        asyncio.run(main())
    assert cleaned == [1]


def test_work_ends_as_soon_as_the_client_is_known_to_have_left() -> None:
    """Beside a busy engine each of them may take as long as a token."""
    turns: list[int] = []

    async def main() -> None:
        client = Client()
        num_turns = 0

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                turns.append(num_turns)

        task = asyncio.create_task(until_disconnect(client.receive, work()))
        for _ in range(3):
            await asyncio.sleep(0)
        client.left.set()
        while not turns:
            await asyncio.sleep(0)
            num_turns += 1
        await task

    with pytest.raises(ClientDisconnect):
        asyncio.run(main())
    assert turns == [1]


def test_cancelling_from_outside_cancels_the_work() -> None:
    cancelled: list[int] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(1)
            raise

    async def main() -> None:
        task = asyncio.create_task(until_disconnect(Client().receive, work()))
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert cancelled == [1]
