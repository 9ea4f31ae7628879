"""`kill -9` of whoever is at the top: no process, no port and no shared memory is left of it.

Below it there may be workers, the processes that try grammars, and a server of a chat's own.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests import tiny
from tests.servers import http_request, read_until, send_raw

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = Path("/dev/shm")
WAIT_S = 60.0
GONE_S = 5.0
"""What is left after so long, counts as left."""


def shared_memory() -> set[str]:
    return set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()


@dataclass
class Tree:
    """A process and all below it, as it was before its top is killed."""

    top: subprocess.Popen[bytes]
    shared_memory: set[str]

    def members(self) -> list[psutil.Process]:
        return psutil.Process(self.top.pid).children(recursive=True)

    def wait_for(self, num_members: int) -> list[psutil.Process]:
        deadline = time.monotonic() + WAIT_S
        while len(members := self.members()) < num_members:
            assert time.monotonic() < deadline, f"only {members} have started"
            time.sleep(0.01)
        return members

    def kill(self, members: list[psutil.Process], *, within_s: float = GONE_S) -> list[str]:
        """Kill the top. Returns what is left of it."""
        everybody = [psutil.Process(self.top.pid), *members]
        ports = {port for each in everybody for port in ports_of(each)}
        self.top.kill()
        started = time.monotonic()
        self.top.wait()
        _, alive = psutil.wait_procs(members, timeout=within_s)
        # who has ended and is not buried is somebody else's
        left = [f"process {each.pid}" for each in alive if each.status() != psutil.STATUS_ZOMBIE]
        print(f"{len(members)} gone after {time.monotonic() - started:.2f} s")
        left += [f"port {port}" for port in ports & listening()]
        left += [f"shared memory {name}" for name in shared_memory() - self.shared_memory]
        for each in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        return left


def ports_of(process: psutil.Process) -> set[int]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return {
            each.laddr.port for each in process.net_connections("tcp")
            if each.status == psutil.CONN_LISTEN
        }  # fmt: skip
    return set()


def listening() -> set[int]:
    return {
        each.laddr.port for each in psutil.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    }  # fmt: skip


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Callable[..., tuple[Tree, str]]]:
    """Start `python -m …`; returns its tree and the URL that it says."""
    with contextlib.ExitStack() as stack:

        def plant(*command: str, **environment: str) -> tuple[Tree, str]:
            clean = {k: v for k, v in os.environ.items() if not k.startswith("CHATSERVE_")}
            before = shared_memory()
            top = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={**clean, "CHATSERVE_HOME": str(tmp_path / "home"), **environment},
            )  # fmt: skip
            stack.enter_context(top)
            stack.callback(top.kill)
            assert top.stdout is not None
            line = top.stdout.readline().decode()
            assert line.startswith("ready: "), line
            return Tree(top, before), line.split()[1].removesuffix("/v1")

        yield plant


Plant = Callable[..., tuple[Tree, str]]
SERVE = ("-m", "tests.serve_fake", "--port", "0")
RUNS = [0, *(pytest.param(run, marks=pytest.mark.soak) for run in range(1, 20))]


def begin_stream(url: str, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
    port = int(url.rpartition(":")[2])
    sock = send_raw(port, http_request("POST", "/v1/chat/completions", body))
    read_until(sock, b'"content":"')
    return sock


@pytest.mark.parametrize("run", RUNS)
def test_nothing_is_left_of_a_server_that_was_killed(plant: Plant, run: int) -> None:
    tree, url = plant(*SERVE, "endless", "ok")
    with begin_stream(url, model="endless"):
        members = tree.wait_for(2)
        assert tree.kill(members) == []


def test_who_is_not_tied_to_its_parent_is_found(plant: Plant, tmp_path: Path) -> None:
    """The guard switched off: the tests here would see what it leaves."""
    # too long a name for sockets: the worker has a port
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    tree, _ = plant(*SERVE, "ok", UNTIED="1", XDG_RUNTIME_DIR=str(deep))
    left = tree.kill(tree.wait_for(1), within_s=1)
    assert any(each.startswith("process") for each in left)
    assert any(each.startswith("port") for each in left)


PRIVATE = """
import sys, time
from chatserve.cli.private_server import PrivateServer
command = [sys.executable, "-m", "tests.serve_fake", "--port=0", "ok"]
server = PrivateServer(command, sys.stderr)
while server.progress() is not None:
    server.wait(0.1)
print("ready: http://127.0.0.1:0/v1", flush=True)
time.sleep(1000)
"""


def test_nothing_is_left_of_the_server_of_a_chat_that_was_killed(plant: Plant) -> None:
    tree, _ = plant("-c", PRIVATE)
    members = tree.wait_for(2)
    assert tree.kill(members) == []


@pytest.mark.soak
@pytest.mark.parametrize("run", range(5))
def test_nothing_is_left_of_a_real_model_and_a_grammar_that_is_being_tried(
    plant: Plant, tmp_path: Path, run: int
) -> None:
    folder = tmp_path / "tiny"
    tiny.save_model(folder)
    tree, url = plant(
        "-m", "chatserve.server", "--port", "0", "--device", "cpu", str(folder), OMP_NUM_THREADS="1"
    )
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}}
    formats = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}

    def ask() -> None:
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(
                f"{url}/v1/chat/completions", timeout=WAIT_S,
                json={
                    "model": "tiny", "messages": [{"role": "user", "content": "hi"}],
                    "max_tokens": 400, "response_format": formats,
                },
            )  # fmt: skip

    asking = threading.Thread(target=ask)
    asking.start()
    # the worker, what renders its chats and what tries its grammars
    members = tree.wait_for(3)
    commands = [" ".join(each.cmdline()) for each in members]
    for helper in ("chatserve.models.templates.render", "chatserve.grammar.trial"):
        assert any(helper in command for command in commands)
    assert tree.kill(members) == []
    asking.join()
