"""Clients that read next to nothing of an answer without an end: what that costs, and whom."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from chatserve.engine.token_stream import TokenStream
from chatserve.server.slow_reader import SlowReader
from tests import tiny
from tests.faults.client import LoadClient, Request
from tests.faults.history import Reply
from tests.servers import http_request
from tests.turnstile import House, wait_for

DOORS = ["worker", "controller"]
CONTEXT = 30_000
NUM_NORMAL = 8
LIMIT_S = 2.0
MAX_WAIT_S = 100.0
KV_BYTES = 2 * 2 * 2 * 16 * 4  # of a token: layers, keys and values, heads, their size, float32
MAX_GROWTH = 16 * 1024 * 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder, max_position_embeddings=CONTEXT)
    return folder


@contextmanager
def open_house(folder: Path, door: str, write_timeout_s: float) -> Iterator[House]:
    with ExitStack() as stack:
        house = House(
            stack, folder, is_behind=door == "controller", write_timeout_s=write_timeout_s,
            max_num_seqs=8,
        )  # fmt: skip
        house.close_turnstile()
        house.turnstile.open()
        yield house


class SlowClients:
    """Ask for an answer without an end and take ten bytes of it a second.

    `is_large`: with so much for each token that little of it is too much.
    """

    def __init__(self, house: House, count: int, *, is_large: bool = True) -> None:
        self.socks: list[socket.socket] = []
        self._stopped = threading.Event()
        for _ in range(count):
            sock = socket.socket()
            # as small as the system allows: else it reads for us
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.settimeout(30)
            sock.connect(("127.0.0.1", house.front.port))
            more = {"logprobs": True, "top_logprobs": 20} if is_large else {}
            body = {**house.body(), "stream": True, **more}
            sock.sendall(http_request("POST", "/v1/chat/completions", body))
            self.socks.append(sock)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while not self._stopped.wait(1):
            for sock in self.socks:
                sock.setblocking(False)
                try:
                    sock.recv(10)
                except OSError:
                    continue

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        for sock in self.socks:
            sock.close()


def normal_answers(house: House) -> float:
    """Eight others ask and are answered; the longest gap between two of their tokens."""
    load = LoadClient(house.front.port, timeout_s=60)
    requests = [
        Request({**house.body(), "stream": True, "max_tokens": 40}) for _ in range(NUM_NORMAL)
    ]
    records = asyncio.run(load.send_all(requests, at_once=NUM_NORMAL))
    replies = [Reply(each) for each in records]
    assert all(reply.is_done and reply.texts[0] == "A" * 40 for reply in replies)
    gaps = sorted(late.at - soon.at for reply in replies for soon, late in pairwise(reply.frames))
    return gaps[int(len(gaps) * 0.95)]


def check(folder: Path, door: str, count: int, *, is_large: bool = True) -> str:
    with open_house(folder, door, LIMIT_S * 1000) as house:
        alone = normal_answers(house)
        process = psutil.Process()
        rss = process.memory_info().rss
        clients = SlowClients(house, count, is_large=is_large)
        try:
            asked_at = time.monotonic()
            deadline = asked_at + (MAX_WAIT_S if is_large else 3 * MAX_WAIT_S)
            while house.engine.engine.num_held < count:
                assert time.monotonic() < deadline, "somebody is not held"
                time.sleep(0.01)
            held_s = time.monotonic() - asked_at
            # nobody is computed for who does not read, and nothing is late
            tick = house.engine.stats().tick
            wait_for(lambda: house.engine.stats().last_token_age_s == 0)
            assert house.engine.stats().tick <= tick + 2
            # keys and values are no buffer: they lie in a pool that is there from the start, but
            # the system commits it as it is used
            num_used = house.idle.free_kv_tokens - house.engine.stats().free_kv_tokens
            # a token takes 200 bytes on its way, of which so many are stored there
            assert num_used < 3000 * count
            growth = process.memory_info().rss - rss - num_used * KV_BYTES
            beside = normal_answers(house)
            assert growth < 2 * MAX_GROWTH
            assert house.engine.engine.num_held == count
        finally:
            clients.close()
        wait_for(house.is_free)
        house.wait_until_servers_are_done()
    return (
        f"{count} who do not read, held after {held_s:.0f} s: memory grew by "
        f"{growth / 2**20:.1f} MiB, the 95th percentile of others' gaps went "
        f"from {alone * 1e3:.1f} to {beside * 1e3:.1f} ms"
    )


@pytest.mark.parametrize("door", DOORS)
def test_slow_readers_hold_no_memory_and_no_place(
    folder: Path, door: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = check(folder, door, 4)
    with capsys.disabled():
        print("\n" + said)


@pytest.mark.soak
@pytest.mark.parametrize("door", DOORS)
def test_thirty_two_slow_readers(
    folder: Path, door: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = check(folder, door, 32, is_large=False)
    with capsys.disabled():
        print("\n" + said)


@pytest.mark.parametrize("door", DOORS)
def test_slow_readers_are_cut_and_all_is_free(
    folder: Path, door: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_house(folder, door, LIMIT_S) as house:
        clients = SlowClients(house, 4)
        try:
            wait_for(lambda: house.engine.stats().num_running > 0)
            started_at = time.monotonic()
            wait_for(house.is_free)
            house.wait_until_servers_are_done()
            lasted_s = time.monotonic() - started_at
            # a worker is not blamed for its client
            assert house.registry._workers["w"].num_ejections == 0
        finally:
            clients.close()
        assert house.engine.admission._total == 0
    with capsys.disabled():
        print(f"\nwith a limit of {LIMIT_S:g} s all was free after {lasted_s:.1f} s")


def test_without_a_limit_they_would_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teeth of both: nobody is held, and nobody cut."""
    monkeypatch.setattr(SlowReader, "pause", lambda reader, transport: None)
    longest = 0
    put = TokenStream.put

    def unlimited(stream: TokenStream, event: object) -> None:
        nonlocal longest
        stream._max_pending = 10**9
        put(stream, event)  # type: ignore[arg-type]
        longest = max(longest, len(stream._events))

    monkeypatch.setattr(TokenStream, "put", unlimited)
    with open_house(folder, "worker", LIMIT_S) as house:
        clients = SlowClients(house, 1, is_large=False)
        try:
            wait_for(lambda: longest > 1000)
            assert house.engine.engine.num_held == 0
        finally:
            clients.close()
        wait_for(house.is_free)
