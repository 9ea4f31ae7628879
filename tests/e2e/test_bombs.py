"""Bodies and headers that would like to fill the memory of a server, as processes see them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.test_serve_process import SERVE, Process, port_of
from tests.servers import chunked, http_request, read_all, send_raw

MIB = 1 << 20
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
CHAT = {"model": "ok", "messages": [{"role": "user", "content": "hi"}]}
JSON_TYPE = {"Content-Type": "application/json", "Connection": "close"}
# what the rows of the specification allow is measured and printed; this is where a leak begins
MAX_GROWTH = 96 * MIB


def status_of(port: int, start: bytes, pieces: Iterator[bytes]) -> int:
    """Of the answer to `start` and as much of `pieces` as the server lets in; 0 for none."""
    with send_raw(port, start) as sock:
        with contextlib.suppress(OSError):
            for piece in pieces:
                sock.sendall(piece)
        with contextlib.suppress(OSError):
            answer = read_all(sock)
            return int(answer[9:12]) if answer else 0
    return 0


def head(path: str, **headers: str) -> bytes:
    return http_request("POST", path, headers={**JSON_TYPE, **headers})


def whole(port: int, body: bytes, path: str = CHATS) -> int:
    start = head(path, **{"Content-Length": str(len(body))})
    return status_of(port, start, iter([body]))


def keys(number: int) -> bytes:
    return b"{" + b",".join(b'"%d":0' % i for i in range(number)) + b"}"


def declared(port: int) -> int:
    return status_of(
        port, head(CHATS, **{"Content-Length": str(100 * MIB)}), (b" " * MIB for _ in range(100))
    )


def in_chunks(port: int) -> int:
    pieces = (chunked(b" " * MIB) for _ in range(100))
    return status_of(port, head(CHATS, **{"Transfer-Encoding": "chunked"}), pieces)


def long_header(port: int) -> int:
    start = b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "
    return status_of(port, start, (b"x" * MIB for _ in range(64)))


def many_headers(port: int) -> int:
    lines = b"".join(b"x-%d: y\r\n" % i for i in range(10_000))
    return status_of(port, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + lines + b"\r\n", iter(()))


def long_prompts(port: int) -> int:
    body = json.dumps({"model": "ok", "prompt": "x" * 1_000_000}).encode()
    statuses = {whole(port, body, TEXTS) for _ in range(20)}
    assert len(statuses) == 1
    return statuses.pop()


BOMBS: list[tuple[str, Callable[[int], int], set[int]]] = [
    ("100 MB declared", declared, {413, 0}),
    ("100 MB in chunks", in_chunks, {413, 0}),
    ("a list 100,000 deep", lambda port: whole(port, b"[" * 100_000 + b"]" * 100_000), {400}),
    ("objects 60,000 deep", lambda port: whole(port, b'{"a":' * 60_000 + b"1" + b"}" * 60_000),
     {400}),
    ("300,000 keys", lambda port: whole(port, keys(300_000)), {400}),
    ("1,000,000 keys", lambda port: whole(port, keys(1_000_000)), {413, 0}),
    ("20 prompts of 1 MB", long_prompts, {400}),
    ("a header of 64 MB", long_header, {431, 0}),
    ("10,000 headers", many_headers, {431}),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    home: Path = tmp_path_factory.mktemp("home")
    process = Process(*SERVE, "--port", "0", "ok", "--no-store-responses", home=home)
    try:
        yield process
    finally:
        process.end()


def memory(family: list[psutil.Process]) -> int:
    return sum(member.memory_info().rss for member in family)


def test_bombs_leave_the_server_as_it_was(
    server: Process, capsys: pytest.CaptureFixture[str]
) -> None:
    url = server.ready_url()
    family = [psutil.Process(server.popen.pid), *server.children()]
    with httpx.Client(base_url=url, timeout=60) as client:

        def answers(**fields: Any) -> None:
            assert client.post(CHATS, json={**CHAT, **fields}).status_code == 200

        for _ in range(5):
            answers()
        # parsers and pools have their buffers
        answers(user="x" * 3_000_000)
        for name, send, expected in BOMBS:
            before, started = memory(family), time.monotonic()
            status = send(port_of(url))
            elapsed, growth = time.monotonic() - started, memory(family) - before
            with capsys.disabled():
                print(f"\n  {name}: {status or 'closed'} in {elapsed:.2f} s, "
                      f"{growth / MIB:+.1f} MiB", end="")  # fmt: skip
            assert status in expected, name
            assert growth < MAX_GROWTH, name
            answers()
    assert server.popen.poll() is None
