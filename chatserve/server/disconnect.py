"""Work that nobody waits for any more: ends a coroutine when the client of its request leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope

from chatserve.server.request_id import current_request_id

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
Result = TypeVar("Result")


def log_left(scope: Scope) -> None:
    """A client left before its answer began: a status that only the log knows."""
    logger.info(
        "%d %s %s: the client left, request=%s",
        CLIENT_LEFT, scope["method"], scope["path"][:200], current_request_id(),
    )  # fmt: skip


def nobody_listens(request: Request) -> Response:
    """What goes to a client that has left."""
    log_left(request.scope)
    return Response(status_code=CLIENT_LEFT)


async def disconnected(receive: Receive) -> None:
    """Wait until the client is gone; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work`, cancelling it when the client leaves.

    Returns only after `work` has ended, so its `finally` has run. Raises `ClientDisconnect`.
    """
    task = asyncio.ensure_future(work)
    has_left = False

    async def leave() -> None:
        nonlocal has_left
        await disconnected(receive)
        has_left = not task.done()
        # here, and not by whom this would have to wake: beside a busy engine a turn takes its time
        task.cancel()

    watch = asyncio.ensure_future(leave())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and not has_left:
            return task.result()
        raise ClientDisconnect
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
