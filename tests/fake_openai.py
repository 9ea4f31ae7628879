"""A tiny OpenAI-compatible server whose answers depend only on the last question.

For tests of the client and the terminal. Run as a program it plays a private server: it prints
`listening:` and `ready:` as `chatserve serve` does, and ends when its parent does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = {
    "id": "fake-1b",
    "object": "model",
    "chatserve": {
        "device": "cpu",
        "dtype": "float32",
        "weight_bits": 8,
        "context_length": 2048,
        "template": "vicuna_v1.1",
    },
}
ESCAPES = ("\x1b]0;ow", "ned\x07sa", "\x1b", "[2Jfe\x1b[31", "m 你\u202e好\n")


class Stream:
    """The server's end of one streamed answer."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.body: dict[str, Any] = handler.body
        self.is_over = False

    def raw(self, data: bytes) -> None:
        self._handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def event(self, table: dict[str, Any]) -> None:
        self.raw(b"data: " + json.dumps(table).encode() + b"\n\n")

    def text(self, *pieces: str) -> None:
        for piece in pieces:
            self.event({"choices": [{"delta": {"content": piece}, "finish_reason": None}]})

    def end(self, reason: str = "stop", num_tokens: int = 3) -> None:
        self.event({"choices": [{"delta": {}, "finish_reason": reason}]})
        self.event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": num_tokens}})
        self.raw(b"data: [DONE]\n\n")

    def finish_body(self) -> None:
        """End the HTTP body properly, whatever the events said."""
        if not self.is_over:
            self.raw(b"")
            self.is_over = True

    def die(self) -> None:
        """Reset the connection, as a killed process does."""
        connection = self._handler.connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._handler.close_connection = self.is_over = True
        connection.close()

    def has_news(self, within_s: float) -> bool:
        """Whether the client sends something or leaves."""
        return bool(select.select([self._handler.connection], [], [], within_s)[0])

    def wait_for_disconnect(self) -> None:
        try:
            data = self._handler.connection.recv(1)
        except ConnectionResetError:  # it left without reading all that was sent
            data = b""
        if data == b"":
            self.is_over = True
            self._handler.server.cancelled.set()


def _hello(stream: Stream) -> None:
    stream.text("Hel", "lo", " there.")
    stream.end()


def _chinese(stream: Stream) -> None:
    stream.text(*"你好，世界🌍")
    stream.end()


def _escapes(stream: Stream) -> None:
    stream.text(*ESCAPES)
    stream.end()


def _markdown(stream: Stream) -> None:
    stream.text("# Ti", "tle\n\nSome **bo", "ld** text.\n\n- one\n", "- two\n")
    stream.end()


def _long(stream: Stream) -> None:
    stream.text("As I was say")
    stream.end("length", num_tokens=16)


def _endless(stream: Stream) -> None:
    stream.text("one ", "two ", "three")
    stream.wait_for_disconnect()


def _silent(stream: Stream) -> None:
    stream.wait_for_disconnect()


def _die(stream: Stream) -> None:
    stream.text("half an")
    stream.die()


def _cut(stream: Stream) -> None:
    stream.text("half an")
    stream.finish_body()


def _failing(stream: Stream) -> None:
    stream.text("half an")
    stream.event({"error": {"message": "worker \x1b[2Jdied", "code": "worker_died"}})
    stream.finish_body()


def _junk(stream: Stream) -> None:
    stream.raw(b"data: \xff\xfe{junk\n\n")
    stream.finish_body()


def _ten_megabytes(stream: Stream) -> None:
    stream.text("before")
    for _ in range(160):
        stream.raw(b"x" * 65536)
    stream.finish_body()


def _flaky(stream: Stream) -> None:
    server = stream._handler.server
    if sum(body == stream.body for body in server.bodies) < 3:
        stream.die()
    else:
        _hello(stream)


def _relieved(stream: Stream) -> None:
    """Comments alone for a while, as behind a controller whose worker has died."""
    stream.text("half ", "an")
    for _ in range(3):
        stream.raw(b": ping\n\n")
    stream.text(" answer")
    stream.end()


def _slow(stream: Stream) -> None:
    """32 tokens, one every 10 ms: something to watch."""
    for index in range(32):
        stream.text(f"{index} ")
        time.sleep(0.01)
    stream.end(num_tokens=32)


def _echo(stream: Stream) -> None:
    messages = [f"{m['role']}: {m['content']}" for m in stream.body["messages"]]
    stream.text("\n".join(messages))
    stream.end()


def _queue(stream: Stream) -> None:
    stream.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    for comment in ("loading 1 4", "queue 3", "ping", "queue 2", "queue none", "loading"):
        stream.raw(f": {comment}\n\n".encode())
    _hello(stream)


SCRIPTS: dict[str, Callable[[Stream], None]] = {
    "hello": _hello,
    "chinese": _chinese,
    "escapes": _escapes,
    "markdown": _markdown,
    "long": _long,
    "endless": _endless,
    "silent": _silent,
    "die": _die,
    "cut": _cut,
    "failing": _failing,
    "junk": _junk,
    "ten megabytes": _ten_megabytes,
    "flaky": _flaky,
    "slow": _slow,
    "relieved": _relieved,
    "queue": _queue,
}
REFUSALS: dict[str, tuple[int, dict[str, str], bytes]] = {
    "too long": (
        400,
        {},
        b'{"error": {"message": "prompt has 9 tokens", "code": "context_length_exceeded"}}',
    ),
    "busy": (
        429,
        {"retry-after": "7"},
        b'{"error": {"message": "queue is full", "code": "rate_limit_exceeded"}}',
    ),
    "full": (
        429,
        {"retry-after": "3600"},
        b'{"error": {"message": "queue is full for long", "code": "rate_limit_exceeded"}}',
    ),
    "stopping": (
        503,
        {"retry-after": "5"},
        b'{"error": {"message": "drains", "code": "server_shutting_down"}}',
    ),
    "parameter": (
        400,
        {},
        b'{"error": {"message": "no", "code": "unsupported_parameter", "param": "top_k"}}',
    ),
    "html": (200, {"content-type": "text/html"}, b"<html>"),
    "gzip": (200, {"content-encoding": "gzip", "content-type": "text/event-stream"}, b"\x1f\x8b"),
    "bare 500": (500, {}, b"oops"),
    "bare 404": (404, {}, b"[]"),
    "huge error": (500, {}, b"x" * (5 * 1024 * 1024)),
    "redirect": (307, {"location": "http://127.0.0.1:9/elsewhere"}, b""),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeOpenAI
    body: dict[str, Any]

    def do_GET(self) -> None:
        if self.path == "/health/ready":
            self._get_ready()
        elif not self._is_allowed():
            self._answer(401, b'{"error": {"message": "wrong key", "code": "invalid_api_key"}}')
        else:
            self._answer(200, self.server.models)

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(self.body)
        if self.path == "/tokenize":
            tokens = list(range(len(self.body["prompt"].split())))
            self._answer(200, json.dumps({"tokens": tokens, "count": len(tokens)}).encode())
            return
        question = self.body["messages"][-1]["content"]
        if not self._is_allowed():
            self._answer(401, b'{"error": {"message": "wrong key", "code": "invalid_api_key"}}')
        elif refusal := self._refusal(question):
            status, headers, body = refusal
            self._answer(status, body, headers)
        else:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream; charset=utf-8")
            self.send_header("transfer-encoding", "chunked")
            if dropped := self.server.dropped.get(question):
                self.send_header("x-chatserve-messages-dropped", dropped)
            self.end_headers()
            stream = Stream(self)
            self.server.scripts.get(question, _echo)(stream)
            stream.finish_body()

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _get_ready(self) -> None:
        progress = self.server.progress
        if progress is None:
            self._answer(200, b'{"status": "ready"}')
        else:
            model = {"name": "fake-1b", "state": "loading", **progress}
            self._answer(503, json.dumps({"status": "loading", "models": [model]}).encode())

    def _refusal(self, question: str) -> tuple[int, dict[str, str], bytes] | None:
        """`later` is refused once, and told to come back after a second."""
        asked = [body["messages"] for body in self.server.bodies if "messages" in body]
        same = [messages for messages in asked if messages[-1]["content"] == question]
        if question == "later" and len(same) == 1:
            status, _, body = REFUSALS["busy"]
            return status, {"retry-after": "1"}, body
        return REFUSALS.get(question)

    def _is_allowed(self) -> bool:
        key = self.server.key
        return key is None or self.headers["authorization"] == f"Bearer {key}"

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"content-type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class FakeOpenAI(ThreadingHTTPServer):
    """`with FakeOpenAI() as server:` serves on `server.url` until the block ends."""

    daemon_threads = True

    def __init__(self, key: str | None = None, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self._connections: list[socket.socket] = []
        self.key = key
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.models = json.dumps({"object": "list", "data": [MODEL]}).encode()
        self.progress: dict[str, int] | None = None
        self.scripts = dict(SCRIPTS)
        self.bodies: list[dict[str, Any]] = []
        self.dropped: dict[str, str] = {}
        self.cancelled = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> FakeOpenAI:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.append(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no news."""


def _play_private_server(*deeds: str) -> None:
    """Deeds: `load` (half of the bytes, for ever), `stubborn` (SIGTERM does nothing), `CODE:LINE`
    (fail with this last line), `killed` (by SIGKILL), `mute` (never say where it listens).
    """
    fd = int(os.environ["CHATSERVE_PARENT_PIPE"])
    threading.Thread(target=lambda: os.read(fd, 1) or os._exit(1), daemon=True).start()
    for deed in deeds:
        code, is_failure, line = deed.partition(":")
        if is_failure:
            print("12:00:00 INFO server: some log line", file=sys.stderr)
            print(f"chatserve: {line}", file=sys.stderr, flush=True)
            os._exit(int(code))
    if "killed" in deeds:
        os.kill(os.getpid(), signal.SIGKILL)
    if "stubborn" in deeds:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with FakeOpenAI(os.environ["CHATSERVE_API_KEYS"]) as server:
        if "load" in deeds:
            server.progress = {"loaded_bytes": 135_000_000, "total_bytes": 270_000_000}
        if "mute" not in deeds:
            print(f"listening: {server.url}", flush=True)
        print("a line that is no news", flush=True)
        print("log: all is well", file=sys.stderr, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    _play_private_server(*sys.argv[1:])
