"""Whether a server is there, as the chat's status line says it: with real sockets."""

from __future__ import annotations

import socket
import time

from chatserve.cli.reachability import BACK, GONE, Reachability

DEADLINE_S = 20.0


def listener(port: int = 0) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def wait_for(reachability: Reachability, news: str) -> None:
    until = time.monotonic() + DEADLINE_S
    while reachability.news() != news:
        assert time.monotonic() < until, f"{reachability.news()!r} is not {news!r}"
        time.sleep(0.005)


def connected(listening: socket.socket) -> None:
    """Until somebody has looked."""
    listening.settimeout(DEADLINE_S)
    listening.accept()[0].close()


def test_gone_then_back_until_it_is_known() -> None:
    with listener() as first:
        port = first.getsockname()[1]
        reachability = Reachability(f"http://127.0.0.1:{port}/v1", every_s=0.01)
        assert reachability.news() == ""
        connected(first)
    wait_for(reachability, GONE)
    reachability.forget()
    assert reachability.news() == GONE
    with listener(port):
        wait_for(reachability, BACK)
        reachability.forget()
        assert reachability.news() == ""
    wait_for(reachability, GONE)


def test_what_was_never_reached_is_no_news() -> None:
    """Behind a proxy that only HTTP knows of."""
    with listener() as nobody:
        port = nobody.getsockname()[1]
    reachability = Reachability(f"http://127.0.0.1:{port}/v1", every_s=0.001)
    looks = 0
    original = reachability._is_there

    def counted() -> bool:
        nonlocal looks
        looks += 1
        return original()

    reachability._is_there = counted  # type: ignore[method-assign]
    until = time.monotonic() + DEADLINE_S
    while looks < 3 and time.monotonic() < until:
        assert reachability.news() == ""
        time.sleep(0.0005)
    assert looks >= 3


def test_nobody_is_looked_at_for_whom_nobody_asks() -> None:
    with listener() as there:
        reachability = Reachability(f"http://127.0.0.1:{there.getsockname()[1]}/v1", every_s=0.01)
        reachability.news()
        until = time.monotonic() + DEADLINE_S
        while reachability._is_looking and time.monotonic() < until:
            time.sleep(0.005)
        assert not reachability._is_looking
