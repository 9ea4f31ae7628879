"""In front of the relay: who asks for a model that is not loaded waits until it is.

A stream is told how far it is meanwhile, in comments; whoever wants one answer waits for so long
and no longer. Reads nothing of a request but whether it wants a stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Protocol

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from chatserve.errors import ChatserveError, ModelNotLoaded
from chatserve.protocol.sse import PING, encode_loading
from chatserve.server.disconnect import disconnected, until_disconnect
from chatserve.server.error_response import error_event
from chatserve.server.repertoire.model import Model
from chatserve.server.repertoire.models import Repertoire
from chatserve.server.repertoire.rows import ModelRows
from chatserve.server.upstream import told_error

QUICK_S = 1.0
"""What goes wrong so soon still has a status of its own."""
TELL_S = 1.0

Forward = Callable[[Request, str, bytes], Awaitable[Response]]


class Adapters(Protocol):
    """`chatserve.server.adapter_dispatch.AdapterDispatch`, as a gate uses it."""

    def is_wanted(self, model: str) -> bool: ...
    async def until_served(self, model: str) -> None: ...


class Gate:
    """`forward` is the relay's."""

    def __init__(
        self,
        repertoire: Repertoire,
        rows: ModelRows,
        forward: Forward,
        adapters: Callable[[], Adapters],
    ) -> None:
        self._repertoire = repertoire
        self._rows = rows
        self._forward = forward
        self._adapters = adapters

    async def forward(self, request: Request, model: str, body: bytes) -> Response:
        """What the relay answers, at once or when the model is there. Raises what that raises, and
        why the model cannot be loaded."""
        found = self._repertoire.find(model)
        if found is None:
            return await self._forward(request, model, body)
        with self._repertoire.held(found):
            if self._is_missing(found, model):
                is_stream = await asyncio.to_thread(_wants_stream, body)
                until_ready = asyncio.ensure_future(self._until_served(found, model))
                waiting: asyncio.Future[None] | None = until_ready
                try:
                    limit_s = QUICK_S if is_stream else self._repertoire.policy.load_timeout_s
                    await until_disconnect(request.receive, _within(until_ready, limit_s))
                    if not until_ready.done():
                        if is_stream:
                            stream = LoadingStream(self, request, model, found, body, until_ready)
                            waiting = None
                            return stream
                        raise self._still_loading(found, model, limit_s)
                    until_ready.result()
                finally:
                    if waiting is not None:
                        await _ended(waiting)
            return await self._forward(request, model, body)

    async def go_on(self, request: Request, model: str, found: Model, body: bytes) -> Response:
        with self._repertoire.held(found):
            await self._until_served(found, model)
            return await self._forward(request, model, body)

    def _is_missing(self, found: Model, model: str) -> bool:
        """Whether it is known that no worker serves `model`, which is `found` or stands beside it,
        and that one may."""
        if found.phase == "ready" and (
            model == found.name or not self._adapters().is_wanted(model)
        ):
            return False
        return not self._repertoire.is_served(model)

    async def _until_served(self, found: Model, model: str) -> None:
        await self._repertoire.until_ready(found)
        if model == found.name:
            return
        limit_s = self._repertoire.policy.load_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._adapters().until_served(model)
        except TimeoutError:
            raise self._still_loading(found, model, limit_s) from None

    def progress(self, model: Model) -> bytes:
        return encode_loading(*self._rows.progress(model))

    def held(self, model: Model) -> contextlib.AbstractContextManager[None]:
        return self._repertoire.held(model)

    def _still_loading(self, found: Model, model: str, limit_s: float) -> ChatserveError:
        loaded, total = self._rows.progress(found)
        far = f" ({loaded / total:.0%})" if total and found.phase != "ready" else ""
        return ModelNotLoaded(
            f"{model[:100]} is still being loaded after {limit_s:g} s{far}; try again later, or "
            "with `stream`, which tells how far it is",
            retry_after_s=10,
        )


class LoadingStream(Response):
    """A stream that has begun before its model was there, and then goes on as the relay's own."""

    def __init__(
        self,
        gate: Gate,
        request: Request,
        model: str,
        found: Model,
        body: bytes,
        waiting: asyncio.Future[None],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-store",
                "x-accel-buffering": "no",
            }
        )
        self.inner: Response | None = None
        self._gate = gate
        self._request = request
        self._model = model
        self._found = found
        self._body = body
        self._waiting = waiting
        # from now on, and not only when it is sent
        self._hold = contextlib.ExitStack()
        self._hold.enter_context(gate.held(found))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            if not await self._wait(receive, send):
                return
            try:
                inner = await self._gate.go_on(self._request, self._model, self._found, self._body)
            except ClientDisconnect:
                return
        except ChatserveError as error:
            await send(_body(error_event(error, path)))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        finally:
            self._hold.close()
            await _ended(self._waiting)
        self.inner = inner
        if not inner.headers.get("content-type", "").startswith("text/event-stream"):
            refusal = told_error(bytes(inner.body), inner.status_code)
            await send(_body(error_event(refusal, path)))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return

        async def go_on(message: Message) -> None:
            if message["type"] != "http.response.start":
                await send(message)

        await inner(scope, receive, go_on)

    async def _wait(self, receive: Receive, send: Send) -> bool:
        """False when the client has left. Raises why there is nothing to wait for."""
        gone = asyncio.ensure_future(disconnected(receive))
        last = b""
        try:
            while not self._waiting.done():
                far = self._gate.progress(self._found)
                await send(_body(far if far != last else PING))
                last = far
                await asyncio.wait(
                    {gone, self._waiting}, timeout=TELL_S, return_when=asyncio.FIRST_COMPLETED
                )
                if gone.done():
                    return False
            self._waiting.result()
            return True
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)


def _wants_stream(body: bytes) -> bool:
    try:
        return orjson.loads(body).get("stream") is True
    except (ValueError, AttributeError):
        return False  # the worker says what is wrong


async def _within(waiting: asyncio.Future[None], seconds: float) -> None:
    await asyncio.wait({waiting}, timeout=seconds)


async def _ended(waiting: asyncio.Future[None]) -> None:
    """It is waited for no more; the load itself goes on."""
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


def _body(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}
