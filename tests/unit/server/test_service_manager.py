"""What systemd hears, on a real datagram socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatserve import environment
from chatserve.server.service_manager import ServiceManager

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
PATIENCE = "EXTEND_TIMEOUT_USEC=30000000"


class Systemd:
    def __init__(self, address: str) -> None:
        self.address = address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.settimeout(20)
        self._sock.bind("\0" + address[1:] if address.startswith("@") else address)

    def close(self) -> None:
        self._sock.close()

    def next(self) -> list[str]:
        return self._sock.recv(4096).decode().split("\n")


ABSTRACT = pytest.param(
    "abstract", marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
)


@pytest.fixture(params=["file", ABSTRACT])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    address = f"@chatserve-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "s")
    with contextlib.closing(Systemd(address)) as systemd:
        yield systemd


def test_ready_and_stopping(systemd: Systemd) -> None:
    manager = ServiceManager(systemd.address)
    manager.ready()
    assert systemd.next() == ["READY=1", "STATUS=ready"]
    manager.stopping()
    assert systemd.next() == ["STOPPING=1", "STATUS=finishing what is under way", PATIENCE]


def test_it_hears_how_far_loading_is_and_then_that_the_loop_goes_round(systemd: Systemd) -> None:
    async def main() -> None:
        manager = ServiceManager(systemd.address, watchdog_s=0.02)
        async with manager.told(lambda: "vicuna:\nloading"):
            first = await asyncio.to_thread(systemd.next)
            assert first == ["WATCHDOG=1", PATIENCE, "STATUS=vicuna: loading"]
            manager.ready()
            while await asyncio.to_thread(systemd.next) != ["READY=1", "STATUS=ready"]:
                pass
            for _ in range(3):
                assert await asyncio.to_thread(systemd.next) == ["WATCHDOG=1"]

    asyncio.run(main())


def test_without_a_watchdog_it_hears_nothing_of_a_server_that_runs(systemd: Systemd) -> None:
    async def main() -> None:
        manager = ServiceManager(systemd.address)
        manager.ready()
        async with manager.told(lambda: ""):
            await asyncio.sleep(0)
        manager.stopping()

    asyncio.run(main())
    assert systemd.next()[0] == "READY=1"
    assert systemd.next()[0] == "STOPPING=1"


@pytest.mark.parametrize("address", [None, "/no/such/socket", "@chatserve-nobody", "x" * 500])
def test_nobody_listens(address: str | None) -> None:
    ServiceManager(address).ready()


def test_the_environment_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert (environment.notify_socket(), environment.watchdog_s()) == (None, None)
    monkeypatch.setenv("NOTIFY_SOCKET", "@systemd")
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert (environment.notify_socket(), environment.watchdog_s()) == ("@systemd", 30)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert environment.watchdog_s() == 30
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert environment.watchdog_s() is None
    assert not set(VARIABLES) & set(environment.child_environment())
