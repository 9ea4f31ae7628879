"""Real servers for tests: an app on a free port, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from chatserve.server.edge import Edge
from chatserve.server.listener import Listener, bind

Result = TypeVar("Result")
TIMEOUT_S = 30.0


class RunningServer:
    """One server; `call` runs a coroutine on its loop and waits for the result."""

    def __init__(self, edge: Edge, loop: asyncio.AbstractEventLoop, port: int) -> None:
        self.edge = edge
        self.loop = loop
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(TIMEOUT_S)


@contextlib.contextmanager
def serving(build: Callable[[], Edge]) -> Iterator[RunningServer]:
    """Serve what `build` returns; stops at once at the end, cutting what still runs."""
    started: threading.Event = threading.Event()
    stop: list[Callable[[], object]] = []
    servers: list[RunningServer] = []
    failures: list[BaseException] = []

    async def main() -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(stopped.set))
        sock = bind("127.0.0.1", 0)
        edge = build()
        listener = Listener(edge, sock)
        await listener.start()
        servers.append(RunningServer(edge, loop, sock.getsockname()[1]))
        started.set()
        await stopped.wait()
        await listener.stop(drain_s=0, hurry=stopped)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failures.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=run, name="server")
    thread.start()
    assert started.wait(TIMEOUT_S)
    try:
        if failures:
            raise failures[0]
        yield servers[0]
    finally:
        if stop:
            stop[0]()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def send_raw(port: int, request: bytes) -> socket.socket:
    """A connection on which `request` has been written; the caller reads and closes it."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
    sock.sendall(request)
    return sock


def http_request(
    method: str,
    path: str,
    body: Any = None,
    *,
    host: str = "127.0.0.1",
    headers: dict[str, str] | None = None,
) -> bytes:
    """The bytes of one HTTP/1.1 request; `body` becomes JSON unless it is bytes."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = {
        "Host": host,
        **({"Content-Type": "application/json", "Content-Length": str(len(data))} if data else {}),
        **(headers or {}),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data


def read_until(sock: socket.socket, mark: bytes) -> bytes:
    """Read until `mark` has come or the other side has closed."""
    data = b""
    while mark not in data:
        chunk = sock.recv(65536)
        if not chunk:
            break
        data += chunk
    return data


def read_all(sock: socket.socket) -> bytes:
    """Everything until the other side closes."""
    with sock:
        return b"".join(iter(lambda: sock.recv(65536), b""))
