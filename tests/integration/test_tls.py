"""https in front: the API, a worker's heartbeats and the terminal client, over real processes."""

from __future__ import annotations

import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import openai
import pytest

from chatserve.cli.client import ChatClient
from chatserve.errors import NoWorkerAvailable, UsageError
from chatserve.server import handshakes
from chatserve.server.edge import Edge
from chatserve.server.tls import server_context
from chatserve.server.worker import create_worker_app
from tests.certificates import Certificates, issue
from tests.fakes import ANSWER as PIECES
from tests.fakes import FakeEngine, FakeModel
from tests.processes import environment
from tests.servers import RunningServer, read_all, send_raw, serving

WAIT_S = 60.0
ANSWER = "".join(PIECES)
MESSAGES = [{"role": "user", "content": "hi"}]


def build() -> Edge:
    return create_worker_app(FakeEngine(step_s=0), FakeModel())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return issue(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def server(files: Certificates) -> Iterator[RunningServer]:
    with serving(build, tls=server_context(str(files.cert), str(files.key))) as server:
        yield server


def trusting(files: Certificates) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(files.ca))


def test_the_official_client(server: RunningServer, files: Certificates) -> None:
    assert server.url.startswith("https://")
    http = openai.DefaultHttpxClient(verify=trusting(files))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", http_client=http) as client:
        stream = client.chat.completions.create(
            model="fake",
            messages=MESSAGES,  # type: ignore[arg-type]  # a dict will do
            stream=True,
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == ANSWER


def test_the_terminal_client(server: RunningServer, files: Certificates) -> None:
    client = ChatClient(server.url, ca_certs=str(files.ca))
    assert "".join(delta.text for delta in client.stream(MESSAGES, "fake")) == ANSWER
    client.close()
    stranger = ChatClient(server.url, sleep=lambda _s: None)
    with pytest.raises(NoWorkerAvailable, match=r"certificate verify failed.*--ssl-ca-certs"):
        stranger.models()
    stranger.close()


@pytest.mark.parametrize("content", [None, b"", b"junk"])
def test_authorities_that_are_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"--ssl-ca-certs .*ca\.pem"):
        ChatClient("https://127.0.0.1:1", ca_certs=str(path))


def handshake(server: RunningServer, files: Certificates, version: ssl.TLSVersion) -> str | None:
    context = trusting(files)
    context.minimum_version = context.maximum_version = version
    if version < ssl.TLSVersion.TLSv1_2:
        # or OpenSSL would not even ask for it
        context.set_ciphers("ALL:@SECLEVEL=0")
    with (
        send_raw(server.port, b"") as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as sock,
    ):
        return sock.version()


@pytest.mark.filterwarnings("ignore:.*TLSv1.*deprecated:DeprecationWarning")
def test_only_modern_versions(server: RunningServer, files: Certificates) -> None:
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        assert handshake(server, files, version) == version.name.replace("_", ".")
    for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
        with pytest.raises(ssl.SSLError):
            handshake(server, files, version)


def test_plain_http_at_an_https_door(
    server: RunningServer, files: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url.replace("https", "http") + "/health/live")
    assert read_all(send_raw(server.port, b"GET / HTTP/1.1\r\n\r\n")) == b""
    assert httpx.get(f"{server.url}/health/live", verify=trusting(files)).status_code == 200
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


def test_a_handshake_that_does_not_go_on_is_closed(
    files: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "TIMEOUT_S", 0.2)
    tls = server_context(str(files.cert), str(files.key))
    with serving(build, tls=tls) as server, ExitStack() as stack:
        socks = [stack.enter_context(send_raw(server.port, b"\x16\x03\x01")) for _ in range(20)]
        for sock in socks:
            sock.settimeout(WAIT_S)
            with suppress(ConnectionResetError):
                assert sock.recv(100) in (b"", b"\x15\x03\x01\x00\x02\x02\x50")


def test_handshakes_that_do_not_go_on_make_room(
    files: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "MAX_HANDSHAKES", 8)
    tls = server_context(str(files.cert), str(files.key))
    with serving(build, tls=tls) as server, ExitStack() as stack:
        socks = [stack.enter_context(send_raw(server.port, b"")) for _ in range(20)]
        for sock in socks[:12]:
            # those that came first are gone long before their time is over
            sock.settimeout(handshakes.TIMEOUT_S / 2)
            with suppress(ConnectionResetError):
                assert sock.recv(100) == b""
        assert httpx.get(f"{server.url}/health/live", verify=trusting(files)).status_code == 200


class Process:
    """A command with its output as it comes."""

    def __init__(self, stack: ExitStack, home: Path, *arguments: str, **variables: str) -> None:
        self.popen = stack.enter_context(
            subprocess.Popen(
                [sys.executable, *arguments],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env=environment(CHATSERVE_HOME=str(home), PYTHONUNBUFFERED="1", **variables),
            )
        )  # fmt: skip
        stack.callback(self.popen.kill)
        self.lines: list[str] = []

    def line_with(self, words: str) -> str:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(line)
            if words in line:
                return line
        raise AssertionError("".join(self.lines))


def test_a_whole_house_over_https(files: Certificates, tmp_path: Path) -> None:
    shown = ("--ssl-certfile", str(files.cert), "--ssl-keyfile", str(files.key))
    home = tmp_path / "home"
    with ExitStack() as stack:
        controller = Process(
            stack, home, "-m", "chatserve.server.controller", "--port", "0", *shown
        )
        url = controller.line_with("ready: ").split()[1].removesuffix("/v1")
        assert url.startswith("https://127.0.0.1:")
        worker = ("-m", "tests.fake_worker", "ok", "--controller", url, "--model-names", "m")
        stranger = Process(stack, home, *worker)
        assert "certificate" in stranger.line_with("cannot register")
        Process(stack, home, *worker, "--ssl-ca-certs", str(files.ca)).line_with("registered with")
        with httpx.Client(base_url=url, verify=trusting(files), timeout=WAIT_S) as client:
            body = {"model": "m", "messages": MESSAGES}
            while (answer := client.post("/v1/chat/completions", json=body)).status_code == 404:
                pass
            assert answer.json()["choices"][0]["message"]["content"] == ANSWER
        spoken = subprocess.run(
            [sys.executable, "-m", "chatserve", "chat", "-p", "hi", "--base-url", url,
             "--ssl-ca-certs", str(files.ca)],
            capture_output=True, text=True, timeout=WAIT_S, check=False, stdin=subprocess.DEVNULL,
            env=environment(CHATSERVE_HOME=str(home)),
        )  # fmt: skip
        assert (spoken.returncode, spoken.stdout.strip()) == (0, ANSWER.strip()), spoken.stderr


def test_serve_over_https(files: Certificates, tmp_path: Path) -> None:
    """Its own workers come over loopback, where the certificate's name is none of theirs."""
    other = issue(tmp_path / "other", "chat.example")
    variables = {"CHATSERVE_SSL_CERTFILE": str(other.cert), "CHATSERVE_SSL_KEYFILE": str(other.key)}
    with ExitStack() as stack:
        server = Process(
            stack, tmp_path / "home", "-m", "tests.serve_fake", "--port", "0", "ok", **variables
        )
        url = server.line_with("ready: ").split()[1]
        assert url.startswith("https://127.0.0.1:")
        context = trusting(other)
        plain = stack.enter_context(send_raw(httpx.URL(url).port or 0, b""))
        with context.wrap_socket(plain, server_hostname="chat.example") as sock:
            sock.sendall(b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_a_file_that_is_missing_is_named(command: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "chatserve", command, str(tmp_path), "--port", "0",
         "--ssl-certfile", "/no/cert.pem"],
        capture_output=True, text=True, timeout=WAIT_S, check=False,
        env=environment(CHATSERVE_HOME=str(tmp_path)),
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "--ssl-certfile /no/cert.pem" in result.stderr


def test_a_worker_behind_a_controller_has_none(files: Certificates, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "chatserve", "worker", "/no/weights", "--controller", "https://a",
         "--ssl-certfile", str(files.both)],
        capture_output=True, text=True, timeout=WAIT_S, check=False,
        env=environment(CHATSERVE_HOME=str(tmp_path), CHATSERVE_CONTROL_TOKEN="t"),
    )  # fmt: skip
    assert result.returncode == 2 and "leave --ssl-certfile out" in result.stderr
