"""Requests that no client library would send, each with what has to become of it.

A proxy in front that reads a request otherwise than the server lets its sender put words into the
mouth of the next client. So behind every bad case stands a second request, which must never be
answered.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from tests.servers import TIMEOUT_S, send_raw

Verdict = Literal["refused", "closed", "fine"]

BODY = b'{"prompt":"abc"}'
SECOND = b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
LINE = b"POST /tokenize HTTP/1.1\r\n"
HOST = b"Host: 127.0.0.1\r\n"
V1_0 = b"POST /tokenize HTTP/1.0\r\n"
JSON = b"Content-Type: application/json\r\n"
LENGTH = b"Content-Length: 16\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
IN_CHUNKS = b"10\r\n" + BODY + b"\r\n0\r\n\r\n"
GET = b"GET /health/live HTTP/1.1\r\n" + HOST


@dataclass(frozen=True)
class Case:
    """`data` is what goes out before `SECOND`.

    refused: at most one answer comes, a 4xx, and the connection is closed. closed: the same, and
    the answer may be good. fine: `num_answers` come, and one for `SECOND`.
    """

    name: str
    data: bytes
    verdict: Verdict = "refused"
    num_answers: int = 1


def _post(headers: bytes, body: bytes = BODY, line: bytes = LINE) -> bytes:
    return line + HOST + JSON + headers + b"\r\n" + body


def _chunks(body: bytes) -> bytes:
    return _post(CHUNKED, body)


def _get(headers: bytes) -> bytes:
    return GET + headers + b"\r\n"


def _cases() -> list[Case]:
    bad = {
        # two ways to tell the length
        "length and chunks": _post(LENGTH + CHUNKED, IN_CHUNKS),
        "chunks and length": _post(CHUNKED + LENGTH, IN_CHUNKS),
        "length 0 and chunks": _post(b"Content-Length: 0\r\n" + CHUNKED, IN_CHUNKS),
        "length of the chunks and chunks": _post(
            b"Content-Length: %d\r\n" % len(IN_CHUNKS) + CHUNKED, IN_CHUNKS
        ),
        "two lengths": _post(LENGTH + b"Content-Length: 5\r\n"),
        "two equal lengths": _post(LENGTH + LENGTH),
        "list of lengths": _post(b"Content-Length: 16, 5\r\n"),
        "list of equal lengths": _post(b"Content-Length: 16, 16\r\n"),
        "length with a plus": _post(b"Content-Length: +16\r\n"),
        "negative length": _post(b"Content-Length: -16\r\n"),
        "length in hex": _post(b"Content-Length: 0x10\r\n"),
        "length and letters": _post(b"Content-Length: 16abc\r\n"),
        "empty length": _post(b"Content-Length: \r\n"),
        "length of two words": _post(b"Content-Length: 1 6\r\n"),
        "length with an exponent": _post(b"Content-Length: 16e0\r\n"),
        "length with an underscore": _post(b"Content-Length: 1_6\r\n"),
        "length beyond 64 bits": _post(b"Content-Length: 18446744073709551632\r\n"),
        "length in other digits": _post("Content-Length: １６\r\n".encode()),
        "length, space, colon": _post(b"Content-Length : 16\r\n"),
        "length with a NUL": _post(b"Content-Length: 16\x00\r\n"),
        "length with a vertical tab": _post(b"Content-Length:\x0b16\r\n"),
        # ways to tell that there are chunks
        "identity": _post(b"Transfer-Encoding: identity\r\n", IN_CHUNKS),
        "identity and length": _post(LENGTH + b"Transfer-Encoding: identity\r\n"),
        "chunks not last": _post(b"Transfer-Encoding: chunked, gzip\r\n", IN_CHUNKS),
        "unknown coding": _post(b"Transfer-Encoding: xchunked\r\n", IN_CHUNKS),
        "coding in quotes": _post(b'Transfer-Encoding: "chunked"\r\n', IN_CHUNKS),
        "coding, space, colon": _post(b"Transfer-Encoding : chunked\r\n", IN_CHUNKS),
        "coding behind a vertical tab": _post(b"Transfer-Encoding:\x0bchunked\r\n", IN_CHUNKS),
        "coding with a NUL": _post(b"Transfer-Encoding: chunked\x00\r\n", IN_CHUNKS),
        "name of the coding with a NUL": _post(b"Transfer-Encoding\x00: chunked\r\n", IN_CHUNKS),
        "coding on a folded line": _post(b"Transfer-Encoding:\r\n chunked\r\n", IN_CHUNKS),
        "chunked and identity": _post(CHUNKED + b"Transfer-Encoding: identity\r\n", IN_CHUNKS),
        "coding with an underscore": _post(b"Transfer_Encoding: chunked\r\n", IN_CHUNKS),
        # chunks
        "size in 0x": _chunks(b"0x10\r\n" + BODY + b"\r\n0\r\n\r\n"),
        "negative size": _chunks(b"-10\r\n" + BODY + b"\r\n0\r\n\r\n"),
        "size with a plus": _chunks(b"+10\r\n" + BODY + b"\r\n0\r\n\r\n"),
        "space before the size": _chunks(b" 10\r\n" + BODY + b"\r\n0\r\n\r\n"),
        "size with an underscore": _chunks(b"1_0\r\n" + BODY + b"\r\n0\r\n\r\n"),
        "size beyond 64 bits": _chunks(b"10000000000000010\r\n" + BODY + b"\r\n0\r\n\r\n"),
        "size that is none": _chunks(b"zz\r\n" + BODY + b"\r\n0\r\n\r\n"),
        "no size": _chunks(b"\r\n" + BODY + b"\r\n0\r\n\r\n"),
        "line feed behind the size": _chunks(b"10\n" + BODY + b"\r\n0\r\n\r\n"),
        "line feed behind a chunk": _chunks(b"10\r\n" + BODY + b"\n0\r\n\r\n"),
        "return behind a chunk": _chunks(b"10\r\n" + BODY + b"\r0\r\n\r\n"),
        "nothing behind a chunk": _chunks(b"10\r\n" + BODY + b"0\r\n\r\n"),
        "chunk longer than its size": _chunks(b"f\r\n" + BODY + b"\r\n0\r\n\r\n"),
        "line feed in an extension": _chunks(b"10;a\nb\r\n" + BODY + b"\r\n0\r\n\r\n"),
        "last chunk and a line feed": _chunks(b"10\r\n" + BODY + b"\r\n0\n\n"),
        "length in a trailer": _chunks(
            b"10\r\n" + BODY + b"\r\n0\r\nContent-Length: 40\r\n\r\n"
        ),
        "trailer that is none": _chunks(b"10\r\n" + BODY + b"\r\n0\r\nfoo bar\r\n\r\n"),
        # headers
        "folded line": _get(b"X-A: b\r\n c\r\n"),
        "folded with a tab": _get(b"X-A: b\r\n\tc\r\n"),
        "line feeds": _get(b"").replace(b"\r\n", b"\n"),
        "line feed behind a header": _get(b"X-A: b\n"),
        "line feed for the blank line": GET + b"\n",
        "return in a value": _get(b"X-A: b\rc\r\n"),
        "two returns": _get(b"X-A: b\r\r\n"),
        "NUL in a value": _get(b"X-A: b\x00c\r\n"),
        "NUL in a name": _get(b"X\x00A: b\r\n"),
        "control character in a value": _get(b"X-A: b\x01c\r\n"),
        "no colon": _get(b"X-A\r\n"),
        "no name": _get(b": b\r\n"),
        "space in a name": _get(b"X A: b\r\n"),
        "space behind a name": _get(b"X-A : b\r\n"),
        "space before the first header": b"GET /health/live HTTP/1.1\r\n " + HOST + b"\r\n",
        "bytes beyond ASCII in a name": _get("Xä: b\r\n".encode()),
        # the first line
        "HTTP/0.9": b"GET /health/live\r\n\r\n",
        "HTTP/2.0": b"GET /health/live HTTP/2.0\r\n" + HOST + b"\r\n",
        "HTTP/1.2": b"GET /health/live HTTP/1.2\r\n" + HOST + b"\r\n",
        "HTTP/1.10": b"GET /health/live HTTP/1.10\r\n" + HOST + b"\r\n",
        "http/1.1": b"GET /health/live http/1.1\r\n" + HOST + b"\r\n",
        "no slash": b"GET /health/live HTTP 1.1\r\n" + HOST + b"\r\n",
        "tab in the line": b"GET\t/health/live HTTP/1.1\r\n" + HOST + b"\r\n",
        "space in the path": b"GET /health/ live HTTP/1.1\r\n" + HOST + b"\r\n",
        "NUL in the path": b"GET /health/\x00live HTTP/1.1\r\n" + HOST + b"\r\n",
        "line feed in the path": b"GET /health/\nlive HTTP/1.1\r\n" + HOST + b"\r\n",
        "method that is none": b"GE\x00T /health/live HTTP/1.1\r\n" + HOST + b"\r\n",
        "method in small letters": b"get /health/live HTTP/1.1\r\n" + HOST + b"\r\n",
        "preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "greeting of TLS": bytes.fromhex("160301020001000 1fc0303".replace(" ", "")) + b"\x00" * 99,
        "bytes of nothing": bytes(range(1, 200)),
        "tunnel": b"CONNECT 127.0.0.1:80 HTTP/1.1\r\n" + HOST + b"\r\n",
    }  # fmt: skip
    fine = {
        "a length": (_post(LENGTH), 1),
        "chunks": (_chunks(IN_CHUNKS), 1),
        "chunks in capitals": (_post(b"TRANSFER-ENCODING: CHUNKED\r\n", IN_CHUNKS), 1),
        "an extension": (_chunks(b"10;a=b\r\n" + BODY + b"\r\n0\r\n\r\n"), 1),
        "trailers": (_chunks(b"10\r\n" + BODY + b"\r\n0\r\nX-A: b\r\n\r\n"), 1),
        "several chunks": (_chunks(b"1\r\n{\r\n00f\r\n" + BODY[1:] + b"\r\n000\r\n\r\n"), 1),
        "length with zeros": (_post(b"Content-Length: 0016\r\n"), 1),
        "a body that nobody reads": (_get(LENGTH) + BODY, 1),
        "chunks that nobody reads": (_get(CHUNKED) + IN_CHUNKS, 1),
        "three at once": (_get(b"") * 2 + _post(LENGTH), 3),
        "a request in a body": (_get(b"Content-Length: %d\r\n" % len(SECOND)) + SECOND, 1),
        "blank lines before": (b"\r\n\r\n" + _get(b""), 1),
    }  # fmt: skip
    return [
        *(Case(name, data) for name, data in bad.items()),
        *(Case(name, data, "fine", number) for name, (data, number) in fine.items()),
        # HTTP/1.0 knows no chunks; its connection ends all the same
        Case("chunks in HTTP/1.0", _post(CHUNKED, IN_CHUNKS, V1_0), "closed"),
        # whoever asks for something else than HTTP may not have meant HTTP by what follows
        Case("upgrade", _get(b"Connection: Upgrade, close\r\nUpgrade: websocket\r\n"), "closed"),
        # a good one before it is answered, and nothing behind it
        Case("a good one and a bad one", _get(b"") + _get(b"X-A: b\r\n c\r\n"), "refused", 2),
        Case("a good one and bad chunks", _get(b"") + _chunks(b"zz\r\n"), "refused", 2),
    ]


CASES = _cases()


def answers(port: int, data: bytes, *, piece_bytes: int | None = None) -> list[int]:
    """The statuses that come back for `data` and `SECOND`, until the server closes.

    Raises `TimeoutError` when it does not close.
    """
    data += SECOND
    received = b""
    with send_raw(port, b"" if piece_bytes else data) as sock:
        sock.settimeout(TIMEOUT_S)
        try:
            for start in range(0, len(data) if piece_bytes else 0, piece_bytes or 1):
                sock.sendall(data[start : start + (piece_bytes or 1)])
            while chunk := sock.recv(65536):
                received += chunk
        except (ConnectionResetError, BrokenPipeError):
            # closed while we were still writing: what it said before may be lost
            pass
    return statuses(received)


def statuses(received: bytes) -> list[int]:
    """Of whole answers, one behind the other. All of ours have a length."""
    found = []
    while received:
        head, blank, rest = received.partition(b"\r\n\r\n")
        assert blank and head.startswith(b"HTTP/1.1 "), received[:200]
        headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        length = int(headers.get(b"content-length", b"0"))
        found.append(int(head.split()[1]))
        body, received = rest[:length], rest[length:]
        assert len(body) == length, received[:200]
        if found[-1] >= 400:
            assert json.loads(body)["error"]["message"]
    return found


def verdict_on(case: Case, found: list[int]) -> str:
    """`ok`, or what is wrong with these answers."""
    if any(status >= 500 for status in found):
        return f"5xx: {found}"
    if case.verdict == "fine":
        wanted = [*[200] * case.num_answers, 200]
        return "ok" if found == wanted else f"{found} instead of {wanted}"
    before = [200] * (case.num_answers - 1)
    if found[: len(before)] != before:
        return f"{found}: the good ones were not answered"
    rest = found[len(before) :]
    if len(rest) > 1:
        return f"{found}: a second answer"
    is_refused = all(400 <= status < 500 for status in rest)
    return "ok" if is_refused or case.verdict == "closed" else f"{found}: taken"
