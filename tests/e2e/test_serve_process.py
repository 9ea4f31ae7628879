"""`chatserve serve` as processes: readiness, drains, deaths, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from chatserve.running_servers import RunningModel, running_servers
from tests.fakes import ANSWER
from tests.servers import http_request, read_until, send_raw

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0
CHUNKED_END = b"0\r\n\r\n"
SERVE = ("-m", "tests.serve_fake")


class Process:
    """A command of ours, its output read line by line, and everything it has started."""

    def __init__(
        self, *arguments: str, home: Path, pass_fds: tuple[int, ...] = (), **environment: str
    ):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("CHATSERVE_")}
        self.popen = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**clean, "CHATSERVE_HOME": str(home), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=pass_fds,
        )
        self.out: queue.Queue[str] = queue.Queue()
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=self._read_out), threading.Thread(target=self._read_err)
        ]  # fmt: skip
        for reader in self._readers:
            reader.start()

    def _read_out(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.out.put(line)
        self.out.put("")

    def _read_err(self) -> None:
        assert self.popen.stderr is not None
        self.err.extend(self.popen.stderr)

    def next_line(self) -> str:
        line = self.out.get(timeout=TIMEOUT_S)
        assert line, "".join(self.err)
        return line.rstrip("\n")

    def ready_url(self) -> str:
        """Wait for the ready line; returns the URL, without `/v1`."""
        word, url, *_ = self.next_line().split()
        assert word == "ready:" and url.endswith("/v1")
        return url.removesuffix("/v1")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.popen.pid).children(recursive=True)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        code = self.popen.wait(timeout_s)
        for reader in self._readers:
            reader.join(TIMEOUT_S)
        return code

    def lines_of_error(self) -> list[str]:
        """The lines on stderr that are no log."""
        return [line for line in self.err if line.startswith("chatserve")]

    def end(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.wait()
        assert self.popen.stdout is not None and self.popen.stderr is not None
        self.popen.stdout.close()
        self.popen.stderr.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **options: Any) -> Process:
            process = Process(*arguments, home=tmp_path / "home", **options)
            stack.callback(process.end)
            return process

        yield start


@pytest.fixture
def serve(start: Any) -> Any:
    def serve(*arguments: str, **options: Any) -> Process:
        process: Process = start(*SERVE, "--port", "0", *arguments, **options)
        return process

    return serve


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def gone(processes: list[psutil.Process], timeout_s: float = 5.0) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def chat(
    url: str, model: str, *, stream: bool = False, timeout_s: float = 30, **fields: Any
) -> httpx.Response:
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": model, "messages": messages, "stream": stream, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=timeout_s)


class Stream:
    """A streamed answer that has begun; `rest` reads it to its end."""

    def __init__(self, url: str, model: str, **fields: Any) -> None:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": True}
        request = http_request("POST", "/v1/chat/completions", {**body, **fields})
        self._sock = send_raw(port_of(url), request)
        self._data = read_until(self._sock, b'"finish_reason":null}]}\n\n')
        assert b'"role":"assistant"' in self._data

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def rest(self) -> bytes:
        """All of it, to the end of the chunked body or of the connection."""
        if not self._data.endswith(CHUNKED_END):
            self._data += read_until(self._sock, CHUNKED_END)
        return self._data


def error_in(data: bytes) -> str:
    """The code of the error event that ends a stream."""
    event = data[data.index(b'data: {"error"') + len(b"data: ") :].partition(b"\n\n")[0]
    return str(json.loads(event)["error"]["code"])


def test_from_start_to_a_clean_end(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    process = serve("ok", "--load-8bit")
    url = process.ready_url()
    [found] = running_servers()
    assert (found.url, found.pid) == (url, process.popen.pid)
    assert found.models == (RunningModel("ok", "ok"),) and "--load-8bit" in found.flags
    assert httpx.get(f"{url}/health/ready").json()["status"] == "ready"
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        reply = client.chat.completions.create(
            model="ok", messages=[{"role": "user", "content": "hi"}]
        )
        assert reply.choices[0].message.content == "".join(ANSWER)
    children = process.children()
    assert len(children) == 1
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert gone(children, 0.1)
    assert process.out.get() == "" and process.lines_of_error() == []
    assert not list((tmp_path / "home" / "running").iterdir())


def test_the_ready_line_names_adapters(serve: Any) -> None:
    folder = Path(__file__).parent
    process = serve("ok", "--adapter", f"sql={folder}", "--adapter", f"law={folder}")
    assert process.next_line().endswith("/v1 (ok, ok:sql, ok:law)")


def test_two_models_their_names_and_flags_that_workers_get(serve: Any) -> None:
    process = serve(
        "ok", "seconds", "--model-names", "first,second", "--device", "cpu", "--lenient"
    )
    word, url, names = process.next_line().split(maxsplit=2)
    assert (word, names) == ("ready:", "(first, second)")
    models = httpx.get(f"{url}/models").json()["data"]
    assert sorted(model["id"] for model in models) == ["first", "second"]
    assert models[0]["chatserve"]["device"] == "cpu"
    for stream in (False, True):
        reply = chat(url.removesuffix("/v1"), "first", stream=stream, temprature=0)
        assert reply.status_code == 200
        assert reply.headers["x-chatserve-ignored-fields"] == "temprature"
    assert len(process.children()) == 2


def test_control_c_is_130_and_reaches_the_server_only(serve: Any) -> None:
    process = serve("ok")
    process.ready_url()
    [worker] = process.children()
    assert os.getpgid(worker.pid) != os.getpgid(process.popen.pid)
    process.popen.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert gone([worker], 0.1)


def test_worker_that_dies_during_the_drain_is_not_started_again(serve: Any) -> None:
    process = serve("endless", "seconds", QUICK_RESTARTS="1")
    url = process.ready_url()
    by_weights = {child.cmdline()[-1]: child for child in process.children()}
    with Stream(url, "endless") as dies, Stream(url, "seconds") as goes_on:
        process.popen.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/health/ready").status_code != 503:
            pass
        by_weights["endless"].kill()
        assert error_in(dies.rest()) == "worker_died"
        assert b"[DONE]" in goes_on.rest()
    assert process.wait(10) == 0
    assert not [line for line in process.err if "starting it again" in line]


@pytest.mark.parametrize("weights", ["slow-load", "ok"])
def test_nothing_survives_the_end_of_the_parents_pipe(
    serve: Any, weights: str, tmp_path: Path
) -> None:
    theirs, ours = os.pipe()
    process = serve(weights, pass_fds=(theirs,), CHATSERVE_PARENT_PIPE=str(theirs))
    os.close(theirs)
    word, url = process.next_line().split()
    assert word == "listening:" and httpx.get(url.removesuffix("/v1") + "/health/live").is_success
    assert not (tmp_path / "home" / "running").exists()  # it is its starter's alone
    deadline = time.monotonic() + TIMEOUT_S
    while not process.children():
        assert time.monotonic() < deadline
    children = process.children()
    os.close(ours)
    assert process.wait(10) == 1
    assert gone(children)


def test_worker_killed_in_the_middle(serve: Any) -> None:
    process = serve("endless", "--no-resume")
    url = process.ready_url()
    streams = [Stream(url, "endless") for _ in range(4)]
    [worker] = process.children()
    worker.kill()
    for stream in streams:
        with stream:
            data = stream.rest()
            assert error_in(data) == "worker_died"
            assert b"[DONE]" not in data and data.endswith(CHUNKED_END)
    started = time.monotonic()
    while httpx.get(f"{url}/health/ready").status_code != 200:
        assert time.monotonic() - started < 20
    assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == ["endless"]
    with Stream(url, "endless"):
        pass
    [successor] = process.children()
    assert successor.pid != worker.pid


def test_dead_worker_is_missed_at_once(serve: Any) -> None:
    process = serve("ok", "--heartbeat-expiry-s", "60")
    url = process.ready_url()
    process.children()[0].kill()
    deadline = time.monotonic() + 20
    while (ready := httpx.get(f"{url}/health/ready")).status_code == 200:
        assert time.monotonic() < deadline
    assert ready.json()["models"][0]["state"] == "starting"


def test_engine_that_dies_is_replaced(serve: Any) -> None:
    process = serve("dying-engine", QUICK_RESTARTS="1")
    url = process.ready_url()
    [worker] = process.children()
    with Stream(url, "dying-engine") as stream:
        assert error_in(stream.rest()) in ("engine_stopped", "worker_died")
    assert gone([worker], 20)


@pytest.mark.parametrize(
    ("weights", "code", "line"),
    [
        ("missing", 3, "chatserve: no such folder: missing; check the path\n"),
        ("too-big", 4, "chatserve: needs 140 GB, there are 2; try --load-8bit\n"),
        ("wrong-flag", 2, "chatserve: no such template\n"),
        ("refused", 6, "chatserve: the controller refuses this worker\n"),
    ],
)
def test_worker_that_is_no_use_ends_the_server(
    serve: Any, weights: str, code: int, line: str
) -> None:
    process = serve("ok", weights)
    assert process.wait() == code
    assert process.lines_of_error() == [line]
    assert process.err[-1] == line
    assert "Traceback" not in "".join(process.err)


@pytest.mark.parametrize(
    ("weights", "cause"), [("crash", "RuntimeError: the cause"), ("segfault", "killed by SIGSEGV")]
)
def test_crash_loop(serve: Any, weights: str, cause: str) -> None:
    process = serve(weights, QUICK_RESTARTS="1")
    assert process.wait() == 7
    [line] = process.lines_of_error()
    assert line.startswith(f"chatserve: worker {weights} keeps crashing") and cause in line
    assert sum("starting it again" in line for line in process.err) == 5


def test_one_crash_is_survived(serve: Any, tmp_path: Path) -> None:
    process = serve(str(tmp_path / "crash-once"))
    url = process.ready_url()
    assert chat(url, "crash-once").status_code == 200
    assert sum("starting it again" in line for line in process.err) == 1


def test_progress_can_be_asked_for_while_the_model_loads(start: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    process = start(*SERVE, "--port", str(port), str(tmp_path / "slow-load"))
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        assert time.monotonic() < deadline
        with contextlib.suppress(httpx.TransportError):
            ready = httpx.get(f"{url}/health/ready")
            assert ready.status_code == 503
            [model] = ready.json()["models"]
            if model["loaded_bytes"]:
                break
    assert model == {
        "name": "slow-load", "state": "loading", "loaded_bytes": 25, "total_bytes": 100,
    }  # fmt: skip
    assert chat(url, "slow-load").json()["error"]["code"] == "no_worker_available"
    (tmp_path / "go").touch()
    assert process.ready_url() == url
    assert chat(url, "slow-load").status_code == 200
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert "loading slow-load (0 MB)\n" in process.err


def test_stop_while_the_model_loads(serve: Any, tmp_path: Path) -> None:
    theirs, ours = os.pipe()
    process = serve(
        str(tmp_path / "slow-load"), pass_fds=(theirs,), CHATSERVE_PARENT_PIPE=str(theirs)
    )
    url = process.next_line().split()[1].removesuffix("/v1")
    deadline = time.monotonic() + TIMEOUT_S
    while httpx.get(f"{url}/health/ready").json()["models"][0]["state"] != "loading":
        assert time.monotonic() < deadline
    children = process.children()
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert gone(children, 0.1)
    os.close(ours)
    os.close(theirs)


def test_port_in_use_is_found_before_any_worker_starts(start: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        process = start(*SERVE, "--port", str(port), str(tmp_path / "crash-once"))
        assert process.wait() == 5
    assert f"127.0.0.1:{port}" in process.err[-1] and "--port" in process.err[-1]
    assert len(process.err) == 1 and not (tmp_path / "crash-once").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--host", "0.0.0.0", "ok"], 2, ["0.0.0.0", "CHATSERVE_API_KEYS", "--insecure-no-auth"]),
        (["--host", "203.0.113.7", "--insecure-no-auth", "ok"], 5, ["203.0.113.7", "--host"]),
        (["--no-such-flag", "ok"], 2, ["--no-such-flag"]),
        (["--port", "x", "ok"], 2, ["--port"]),
        (["ok", "--model-names", "a,b"], 2, ["--model-names"]),
        (["ok", "ok"], 2, ["--model-names"]),
        (["--api-key-file", "/does/not/exist", "ok"], 2, ["/does/not/exist"]),
    ],
)
def test_one_line_says_what_is_wrong(
    start: Any, arguments: list[str], code: int, words: list[str]
) -> None:
    process = start(*SERVE, *arguments)
    assert process.wait() == code
    [line] = process.lines_of_error()
    assert all(word in line for word in words)
    assert "Traceback" not in "".join(process.err)


def test_public_address_with_a_key(serve: Any) -> None:
    process = serve("--host", "0.0.0.0", "ok", CHATSERVE_API_KEYS="key")
    url = process.ready_url()
    [worker] = process.children()
    assert not worker.environ()["CHATSERVE_API_KEYS"]
    assert chat(url, "ok").status_code == 401
    headers = {"Authorization": "Bearer key"}
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200


def test_settings_meant_for_the_server_do_not_reach_the_worker(serve: Any) -> None:
    """They share their names in the environment: the worker must not take the server's port."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    process = serve("ok", CHATSERVE_PORT=str(port), CHATSERVE_HOST="127.0.0.1")
    assert chat(process.ready_url(), "ok").status_code == 200


def test_controller_and_worker_apart(start: Any) -> None:
    """The worker outlives its controller and finds the next one."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = str(sock.getsockname()[1])
    controller = start("-m", "chatserve.server.controller", "--port", port)
    url = controller.ready_url()
    worker = start("-m", "tests.fake_worker", "ok", "--controller", url)
    wait_until_served(url)
    controller.popen.kill()
    controller.wait()
    successor = start("-m", "chatserve.server.controller", "--port", port)
    assert successor.ready_url() == url
    wait_until_served(url)
    worker.popen.send_signal(signal.SIGTERM)
    assert worker.wait(10) == 0
    response = chat(url, "ok")
    assert response.status_code == 404
    successor.popen.send_signal(signal.SIGTERM)
    assert successor.wait(10) == 0


def wait_until_served(url: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while chat(url, "ok").status_code != 200:
        assert time.monotonic() < deadline


def test_worker_alone(start: Any) -> None:
    worker = start("-m", "tests.fake_worker", "seconds")
    url = worker.ready_url()
    assert httpx.get(f"{url}/health/live", headers={"Host": "evil.example"}).status_code == 403
    with Stream(url, "seconds") as stream:
        worker.popen.send_signal(signal.SIGTERM)
        while (ready := httpx.get(f"{url}/health/ready")).status_code != 503:
            pass
        assert ready.json()["status"] == "draining"
        assert b"[DONE]" in stream.rest()
    assert worker.wait(10) == 0


def test_worker_with_a_wrong_token(start: Any) -> None:
    controller = start("-m", "chatserve.server.controller", "--port", "0")
    url = controller.ready_url()
    worker = start(
        "-m", "tests.fake_worker", "ok", "--controller", url, CHATSERVE_CONTROL_TOKEN="wrong"
    )
    assert worker.wait() == 6
    [line] = worker.lines_of_error()
    assert "refuses this worker (401)" in line


@pytest.mark.parametrize("module", ["server", "server.controller", "server.worker"])
def test_help(start: Any, module: str) -> None:
    process = start("-m", f"chatserve.{module}", "--help")
    assert process.wait() == 0
    assert "--host" in "".join(iter(process.out.get, ""))
