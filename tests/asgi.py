"""Call an ASGI app without a socket. For whole answers only: nothing here can prove streaming."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

Message = MutableMapping[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


def request(
    app: App,
    method: str = "GET",
    path: str = "/",
    *,
    headers: Sequence[tuple[str, str]] = (("host", "127.0.0.1"),),
    body: Sequence[bytes] = (b"",),
    raises: type[Exception] | None = None,
) -> Answer:
    """One request; `body` comes in these pieces. Then the client stays, saying nothing.

    `raises`: the app answers and then raises this, for the server's log.
    """
    return asyncio.run(_call(app, _scope(method, path, headers), body, raises))


def _scope(method: str, path: str, headers: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "scheme": "http",
        "root_path": "",
    }


async def _call(
    app: App,
    scope: dict[str, Any],
    body: Sequence[bytes],
    raises: type[Exception] | None = None,
    has_left: asyncio.Event | None = None,
) -> Answer:
    pieces = list(body)
    sent: list[Message] = []

    async def receive() -> Message:
        if not pieces:
            await (has_left or asyncio.Event()).wait()
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Message) -> None:
        sent.append(message)

    if raises is None:
        await app(scope, receive, send)
    else:
        with pytest.raises(raises):
            await app(scope, receive, send)
    start, *rest = sent
    return Answer(
        status=start["status"],
        headers={k.decode("latin-1"): v.decode("latin-1") for k, v in start["headers"]},
        body=b"".join(message.get("body", b"") for message in rest),
    )


class RunningApp:
    """An app that has started, on a loop of its own: thousands of requests a second."""

    def __init__(self, app: App, runner: asyncio.Runner) -> None:
        self._app = app
        self.runner = runner

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: Sequence[tuple[str, str]] = (("content-type", "application/json"),),
    ) -> Answer:
        return self.runner.run(self.call(method, path, body, headers=headers))

    async def call(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: Sequence[tuple[str, str]] = (),
        has_left: asyncio.Event | None = None,
    ) -> Answer:
        """One request, on the app's own loop, whose client leaves when `has_left` is set."""
        scope = _scope(method, path, [("host", "127.0.0.1"), *headers])
        return await _call(self._app, scope, [body], has_left=has_left)

    def post(self, path: str, payload: Any) -> Answer:
        return self.request("POST", path, json.dumps(payload).encode())


@contextlib.contextmanager
def running(app: App) -> Iterator[RunningApp]:
    """Start `app`, and stop it at the end."""

    async def start() -> tuple[asyncio.Queue[Message], asyncio.Task[None]]:
        to_app: asyncio.Queue[Message] = asyncio.Queue()
        from_app: asyncio.Queue[Message] = asyncio.Queue()
        to_app.put_nowait({"type": "lifespan.startup"})
        task = asyncio.ensure_future(app({"type": "lifespan"}, to_app.get, from_app.put))
        assert (await from_app.get())["type"] == "lifespan.startup.complete"
        return to_app, task

    async def stop(to_app: asyncio.Queue[Message], task: asyncio.Task[None]) -> None:
        to_app.put_nowait({"type": "lifespan.shutdown"})
        await task

    with asyncio.Runner() as runner:
        lifespan = runner.run(start())
        try:
            yield RunningApp(app, runner)
        finally:
            runner.run(stop(*lifespan))
