"""What only sockets tell: a port that is taken, and a hub that answers or does not."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from chatserve.doctor.setup import check_hub, check_port
from chatserve.environment import child_environment
from chatserve.server.listener import bind


def test_the_whole_command_prints_only_json(tmp_path: Path) -> None:
    settings = {"CHATSERVE_HOME": str(tmp_path), "CHATSERVE_PORT": "0", "CHATSERVE_KERNELS": "off"}
    done = subprocess.run(
        [sys.executable, "-m", "chatserve", "doctor", "--json"],
        env=child_environment(**settings), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    found = {finding["name"]: finding for finding in answer["findings"]}
    assert answer["status"] == "warn" and found["kernels"]["status"] == "warn"
    assert found["bandwidth"]["facts"]["gb_per_s"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_free_port_stays_free() -> None:
    with contextlib.closing(bind("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    for _ in range(2):
        found = check_port("127.0.0.1", port)
        assert (found.status, found.text) == ("ok", f"127.0.0.1:{port} is free")


def test_a_port_that_is_taken() -> None:
    with contextlib.closing(bind("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        found = check_port("127.0.0.1", port)
    assert found.status == "warn" and f"127.0.0.1:{port}: address already in use" in found.text
    assert found.way_out is not None and "choose another --port" in found.way_out
    assert f"--base-url http://127.0.0.1:{port}/v1" in found.way_out


def test_an_address_that_is_not_ours() -> None:
    found = check_port("192.0.2.1", 8000)
    assert found.status == "fail" and "--host" in (found.way_out or "")


@contextlib.contextmanager
def hub(status: int, paths: list[str]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("code", "status"), [(200, "ok"), (503, "warn"), (401, "warn")])
def test_a_hub_that_answers(code: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[str] = []
    with hub(code, paths) as url:
        monkeypatch.setenv("HF_ENDPOINT", f"{url}/")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        found = check_hub(is_online=True)
    assert found.status == status and found.facts["status"] == code
    assert url in found.text and paths[0].startswith("/api/models/")
    assert (found.way_out is None) == (status == "ok")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with hub(200, []) as url:
        pass
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    found = check_hub(is_online=True)
    assert found.status == "warn" and "cannot be reached" in found.text
    assert "--offline" in (found.way_out or "")
