"""The server process of a chat: its progress, its failures, its end."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chatserve.cli.answer import Progress
from chatserve.cli.private_server import PrivateServer
from chatserve.errors import (
    CannotBind,
    CrashLoop,
    DoesNotFit,
    ModelLoadError,
    RegistrationFailed,
    StartupError,
    UsageError,
)
from tests import fake_openai

Start = Callable[..., PrivateServer]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts private servers and closes them in the end."""
    servers = []

    def start_server(*deeds: str) -> PrivateServer:
        server = PrivateServer([sys.executable, fake_openai.__file__, *deeds], io.StringIO())
        servers.append(server)
        return server

    yield start_server
    for server in servers:
        server.close()


def wait_until(condition: Callable[[], bool], server: PrivateServer) -> None:
    for _ in range(400):
        if condition():
            return
        server.wait(0.05)
    raise AssertionError("it never happened")


def wait_for_failure(server: PrivateServer) -> StartupError:
    with pytest.raises(StartupError) as caught:
        wait_until(lambda: server.progress() is None, server)
    return caught.value


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_becomes_ready_and_answers(start: Start) -> None:
    server = start()
    assert server.progress() == Progress(state="starting")
    wait_until(lambda: server.progress() is None, server)
    assert server.model().name == "fake-1b"
    deltas = server.stream([{"role": "user", "content": "hello"}], {})
    assert "".join(delta.text for delta in deltas) == "Hello there."


def test_its_progress_is_known_before_it_is_ready(start: Start) -> None:
    server = start("load")
    half = Progress("fake-1b", "loading", 135_000_000, 270_000_000)
    wait_until(lambda: server.progress() == half, server)


@pytest.mark.parametrize(
    "kind",
    [UsageError, ModelLoadError, DoesNotFit, CannotBind, RegistrationFailed, CrashLoop,
     StartupError],
)  # fmt: skip
def test_its_exit_code_and_last_line_are_passed_on(kind: type[StartupError], start: Start) -> None:
    failure = wait_for_failure(start(f"{kind.exit_code}:no \x1b[2Jshard in /weights"))
    assert type(failure) is kind
    assert failure.message == "no shard in /weights"


def test_a_worker_that_keeps_crashing_is_quoted(start: Start) -> None:
    ours = "12:00:00 WARNING server: worker w ended (exit code 1)"
    log = f"Traceback\nImportError: lib\x1b[2Jx.so\n{ours}\n"
    failure = wait_for_failure(start(f"7:{log}chatserve: worker w keeps crashing"))
    assert type(failure) is CrashLoop
    assert failure.message == (
        "worker w keeps crashing; before that the log has: ImportError: libx.so"
    )


def test_a_server_that_ends_without_a_word(start: Start) -> None:
    failure = wait_for_failure(start("9:"))
    assert failure.message == "the server ended with exit code 9"
    assert failure.exit_code == 1


def test_a_server_that_was_killed(start: Start) -> None:
    failure = wait_for_failure(start("killed"))
    assert failure.message == (
        "the server was killed by SIGKILL: the system may have run out of memory"
    )


def test_a_command_that_does_not_exist() -> None:
    before = set(os.listdir("/dev/fd"))
    with pytest.raises(StartupError, match=r"cannot start /no/such: No such file or directory"):
        PrivateServer(["/no/such"], io.StringIO())
    assert set(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("deeds", [(), ("load",), ("mute",), ("stubborn",)])
def test_closing_leaves_no_process_file_or_descriptor(
    deeds: tuple[str, ...], start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("chatserve.cli.private_server.STOP_TIMEOUT_S", 0.3)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(os.listdir("/dev/fd"))
    command = [sys.executable, fake_openai.__file__, *deeds]
    server = PrivateServer(command, io.StringIO())
    wait_until(lambda: "all is well" in server._log_tail(), server)
    pid = server._process.pid
    server.close()
    assert not is_alive(pid)
    assert list(tmp_path.iterdir()) == []
    assert set(os.listdir("/dev/fd")) == before


def test_ctrl_c_cannot_reach_it(start: Start) -> None:
    server = start()
    assert os.getsid(server._process.pid) != os.getsid(0)


def test_its_log_is_shown_with_debug_only() -> None:
    err = io.StringIO()
    server = PrivateServer([sys.executable, fake_openai.__file__, "load"], err, debug=True)
    wait_until(lambda: "all is well" in server._log_tail(), server)
    assert err.getvalue() == ""
    server.close()
    assert "log: all is well\n" in err.getvalue()
