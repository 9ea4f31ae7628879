"""Messages between a process and its helper: whole, bounded, in time."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from chatserve import frames

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize(
    "message",
    [{}, [1, None, 2.5], "é🙂\0\x1b", "\ud800x\udc00", "\ud83d\ude00", {"a": "x" * 10**6}],
)
def test_a_message_arrives_as_it_was_sent(message: Any, pair: Pair) -> None:
    sending = threading.Thread(target=frames.send, args=(pair[0], message))
    sending.start()
    assert frames.receive(pair[1], seconds=20) == message
    sending.join()


def test_the_end_is_none_also_within_a_message(pair: Pair) -> None:
    pair[0].sendall(struct.pack(">I", 9) + b"half")
    pair[0].close()
    assert frames.receive(pair[1]) is None
    assert frames.receive(pair[1]) is None


@pytest.mark.parametrize("data", [b"{", b"\xff", b"[" * 100_000], ids=["open", "bytes", "deep"])
def test_what_is_no_json_is_an_error_of_the_connection(data: bytes, pair: Pair) -> None:
    pair[0].sendall(struct.pack(">I", len(data)) + data)
    with pytest.raises(ConnectionError, match="no JSON"):
        frames.receive(pair[1])


def test_what_is_too_long_is_not_read(pair: Pair) -> None:
    pair[0].sendall(struct.pack(">I", 1 << 31))
    with pytest.raises(ConnectionError, match="2,147,483,648 bytes, over 10"):
        frames.receive(pair[1], max_bytes=10)


def test_who_says_nothing_is_waited_for_only_so_long(pair: Pair) -> None:
    with pytest.raises(TimeoutError):
        frames.receive(pair[1], seconds=0.01)
