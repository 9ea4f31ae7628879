"""How long a client may leave its answer unread, on a loop whose time the test moves."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from chatserve.server.listener import bind
from chatserve.server.slow_reader import MAX_UNSENT_BYTES, MIN_PROGRESS_BYTES, SlowReader


class Loop:
    """Timers, and nothing else of a loop."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []

    def call_later(self, delay: float, work: Callable[..., None], *arguments: Any) -> Timer:
        timer = Timer(self.now + delay, lambda: work(*arguments))
        self.timers.append(timer)
        return timer

    def advance(self, seconds: float) -> None:
        self.now += seconds
        due = [each for each in self.timers if each.due <= self.now]
        self.timers = [each for each in self.timers if each.due > self.now]
        for timer in due:
            if not timer.is_cancelled:
                timer.work()

    @property
    def num_open(self) -> int:
        return sum(not each.is_cancelled for each in self.timers)


class Timer:
    def __init__(self, due: float, work: Callable[[], None]) -> None:
        self.due = due
        self.work = work
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Transport:
    def __init__(self) -> None:
        self.num_bytes = 70_000
        self.is_aborted = False

    def get_write_buffer_size(self) -> int:
        return self.num_bytes

    def abort(self) -> None:
        self.is_aborted = True


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def transport() -> Any:
    return Transport()


def reader_on(loop: Any, timeout_s: float = 30) -> SlowReader:
    return SlowReader(loop, timeout_s)


def test_who_takes_nothing_is_cut_after_its_time(loop: Loop, transport: Any) -> None:
    reader = reader_on(loop)
    reader.pause(transport)
    loop.advance(29)
    assert not transport.is_aborted
    transport.num_bytes -= MIN_PROGRESS_BYTES - 1
    loop.advance(2)
    assert transport.is_aborted and not loop.num_open


def test_who_takes_some_of_it_has_all_the_time_again(loop: Loop, transport: Any) -> None:
    reader = reader_on(loop)
    reader.pause(transport)
    for _ in range(20):
        transport.num_bytes -= MIN_PROGRESS_BYTES
        loop.advance(30)
    assert not transport.is_aborted
    loop.advance(30)
    assert transport.is_aborted


def test_who_catches_up_is_left_alone_and_measured_anew(loop: Loop, transport: Any) -> None:
    reader = reader_on(loop)
    reader.pause(transport)
    loop.advance(29)
    reader.resume()
    assert not loop.num_open
    loop.advance(100)
    reader.pause(transport)
    loop.advance(29)
    assert not transport.is_aborted
    reader.pause(transport)
    assert loop.num_open == 1


def test_without_a_limit_nobody_looks(loop: Loop, transport: Any) -> None:
    reader_on(loop, 0).pause(transport)
    assert not loop.timers


@pytest.mark.skipif(not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="not on this system")
def test_the_system_keeps_little_for_connections_to_us() -> None:
    with closing(bind("127.0.0.1", 0)) as door:
        with socket.create_connection(door.getsockname()):
            door.setblocking(True)
            connection, _ = door.accept()
            with connection:
                kept = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
        assert kept == MAX_UNSENT_BYTES
