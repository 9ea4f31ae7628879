"""`chatserve serve` on one machine: its workers have no port, and a folder that is theirs alone."""

from __future__ import annotations

import signal
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.test_serve_process import Process, chat, serve, start

__all__ = ["serve", "start"]  # fixtures
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no sockets with files there")


@pytest.fixture
def runtime() -> Iterator[Path]:
    """Of a short name, as a session's own folder has."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def ports_of(process: Process) -> list[int]:
    """Those that its workers listen on."""
    return [
        connection.laddr.port
        for child in process.children()
        for connection in child.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def test_workers_have_no_port_and_a_killed_server_leaves_no_folder_for_long(
    serve: Any, runtime: Path
) -> None:
    killed: Process = serve("ok", XDG_RUNTIME_DIR=str(runtime))
    assert chat(killed.ready_url(), "ok").status_code == 200
    assert len(killed.children()) == 1 and ports_of(killed) == []
    (folder,) = runtime.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_ISSOCK((folder / "0.sock").stat().st_mode)
    killed.popen.kill()
    killed.wait()
    assert folder.exists()
    second: Process = serve("ok", XDG_RUNTIME_DIR=str(runtime))
    second.ready_url()
    (now,) = runtime.iterdir()
    assert now != folder
    second.popen.send_signal(signal.SIGTERM)
    assert second.wait() == 0
    assert list(runtime.iterdir()) == []


def test_without_a_folder_they_listen_on_loopback(serve: Any, runtime: Path) -> None:
    deep = runtime / ("x" * 80)
    deep.mkdir()
    process: Process = serve("ok", XDG_RUNTIME_DIR=str(deep))
    assert chat(process.ready_url(), "ok").status_code == 200
    assert len(ports_of(process)) == 1
