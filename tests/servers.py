"""Real servers for tests: an app on a free port, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from chatserve.server.connection import Connections
from chatserve.server.edge import Edge
from chatserve.server.listener import Listener, bind, url_of

Result = TypeVar("Result")
TIMEOUT_S = 30.0
Script = Sequence[bytes | threading.Event | None]


class RunningServer:
    """One server; `call` runs a coroutine on its loop and waits for the result."""

    def __init__(
        self,
        edge: Edge,
        loop: asyncio.AbstractEventLoop,
        url: str,
        connections: Connections,
    ) -> None:
        self.edge = edge
        self.connections = connections
        self.loop = loop
        self.port = int(url.rpartition(":")[2])
        self.url = url

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(TIMEOUT_S)

    def wait_until_idle(self) -> None:
        """No request is under way any more: an answer is read before its route has ended."""
        self.call(self.edge.idle())


@contextlib.contextmanager
def serving(
    build: Callable[[], Edge], *, port: int = 0, tls: ssl.SSLContext | None = None, **options: Any
) -> Iterator[RunningServer]:
    """Serve what `build` returns; stops at once at the end, cutting what still runs."""
    started: threading.Event = threading.Event()
    stop: list[Callable[[], object]] = []
    servers: list[RunningServer] = []
    failures: list[BaseException] = []

    async def main() -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(stopped.set))
        sock = bind("127.0.0.1", port, tls)
        edge = build()
        listener = Listener(edge, sock, **options)
        await listener.start()
        servers.append(RunningServer(edge, loop, url_of("127.0.0.1", sock), listener.connections))
        started.set()
        await stopped.wait()
        await listener.drain(seconds=0, hurry=stopped)
        await listener.close()

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


def reset(sock: socket.socket) -> None:
    """Leave as a client does that crashes: the other side gets an RST at once."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


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


class ScriptedWorker:
    """A worker's port without a worker: answers each request with the next scripted bytes.

    A script is what goes out in pieces, one `send` each; at an event it waits until the test sets
    it, at None until the other side closes. Then the connection is closed. `requests` are what
    came in.
    """

    def __init__(self, *scripts: Script) -> None:
        self.requests: list[bytes] = []
        self.closed_by_peer = threading.Event()
        self._scripts = list(scripts)
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._serve, name="scripted worker")

    def __enter__(self) -> ScriptedWorker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # wakes the accept that may still be waiting
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        for script in self._scripts:
            try:
                connection, _ = self._sock.accept()
            except OSError:
                return
            self.answer(connection, script)

    def answer(self, connection: socket.socket, script: Script) -> None:
        with connection:
            connection.settimeout(TIMEOUT_S)
            self.requests.append(read_request(connection))
            for piece in script:
                if isinstance(piece, bytes):
                    connection.sendall(piece)
                elif piece is not None:
                    assert piece.wait(TIMEOUT_S)
                elif not connection.recv(1):
                    self.closed_by_peer.set()


def read_request(connection: socket.socket) -> bytes:
    data = read_until(connection, b"\r\n\r\n")
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while lengths and len(body) < int(lengths[0].partition(b":")[2]):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def chunked(data: bytes) -> bytes:
    """One chunk of a chunked body; that of no data is the end."""
    return b"%x\r\n%s\r\n" % (len(data), data)


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-store\r\nX-Accel-Buffering: no\r\nTransfer-Encoding: chunked\r\n\r\n"
)
