"""`chatserve chat WEIGHTS` where a server of this user serves these weights already."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chatserve.cli.answer import ModelInfo
from chatserve.cli.asking import Server
from chatserve.cli.shared_server import SharedServer, join, running_with
from chatserve.config import ServeConfig
from chatserve.errors import WorkerLost
from chatserve.options import ModelOptions
from chatserve.running_servers import RunningModel, RunningServer, announced, full_weights
from chatserve.settings import flags_of
from tests.fake_openai import FakeOpenAI, Stream
from tests.processes import TIMEOUT_S, environment

FLAGS = tuple(flags_of(ServeConfig(load_8bit=True), ModelOptions))
OWN = "one of its own"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path))
    monkeypatch.delenv("CHATSERVE_API_KEY", raising=False)
    (tmp_path / "weights").mkdir()
    return tmp_path


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as fake:
        yield fake


def described(fake: FakeOpenAI, weights: Path, flags: tuple[str, ...] = FLAGS) -> RunningServer:
    return RunningServer(
        url=fake.url.removesuffix("/v1"), pid=os.getpid(), started_at=time.time(),
        models=(RunningModel("fake-1b", full_weights(str(weights))),), control_token="t",
        flags=flags,
    )  # fmt: skip


@contextmanager
def joined(
    fake: FakeOpenAI, weights: Path, own: FakeOpenAI | None = None
) -> Iterator[tuple[Server, list[str]]]:
    """A chat's server behind `fake`; `own` is what is started in its place."""
    from chatserve.cli.client import ChatClient
    from chatserve.cli.joined_server import JoinedServer

    def start_own() -> Server:
        assert own is not None, "nothing was to be started"
        return JoinedServer(ChatClient(own.url), None)

    told: list[str] = []
    found = running_with(str(weights), FLAGS)
    assert found is not None
    server = join(*found, None, start_own, told.append)
    assert server is not None
    try:
        yield server, told
    finally:
        server.close()


def chat(weights: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.e2e.fake_chat", "--", str(weights), *flags, "-p", "hello"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        env=environment(CHATSERVE_PRIVATE=""),
    )  # fmt: skip


def test_the_same_weights_in_the_same_form_are_joined(fake: FakeOpenAI, home: Path) -> None:
    weights = home / "weights"
    link = home / "link"
    link.symlink_to(weights)
    with announced(described(fake, weights)):
        for path, flags, is_joined in (
            (weights, ["--load-8bit"], True),
            (link, ["--load-8bit", "--offline", "--system=x"], True),
            (weights, [], False),
            (weights, ["--load-8bit", "--private"], False),
            (weights, ["--load-8bit", "--no-join"], False),
            (weights, ["--load-8bit", "--context-length=512"], False),
        ):
            before = len(fake.bodies)
            result = chat(path, *flags)
            assert (result.returncode, result.stdout) == (0, "Hello there.\n"), result.stderr
            assert result.stderr == ""
            assert (len(fake.bodies) > before) is is_joined, flags
    result = chat(weights, "--load-8bit")
    assert (result.returncode, len(fake.bodies)) == (0, 2), "it is not announced any more"


def test_a_server_that_wants_a_key_is_not_joined_without(home: Path) -> None:
    told: list[str] = []
    with FakeOpenAI("secret") as fake, announced(described(fake, home / "weights")):
        found = running_with(str(home / "weights"), FLAGS)
        assert found is not None
        assert join(*found, None, lambda: pytest.fail(OWN), told.append) is None
        assert len(told) == 1 and "wants a key in CHATSERVE_API_KEY" in told[0]
        keyed = join(*found, "secret", lambda: pytest.fail(OWN), told.append)
        assert keyed is not None
        keyed.close()


def test_adapters_and_folders_of_others_are_nobodys_to_join(fake: FakeOpenAI, home: Path) -> None:
    weights = str(home / "weights")
    with announced(described(fake, home / "weights", (*FLAGS, "--adapter=sql"))):
        assert running_with(weights, (*FLAGS, "--adapter=sql")) is None, "of another folder, maybe"
    with announced(described(fake, home / "weights")):
        assert running_with(weights, FLAGS) is not None
        os.chmod(home / "running", 0o755)
        assert running_with(weights, FLAGS) is None


def test_one_that_loads_is_waited_for(fake: FakeOpenAI, home: Path) -> None:
    fake.progress = {"loaded_bytes": 1, "total_bytes": 2}
    weights = home / "weights"
    with announced(described(fake, weights)), joined(fake, weights) as (server, told):
        assert "--private starts another" in told[0]
        progress = server.progress()
        assert progress is not None and progress.loaded_bytes == 1
        assert server.count_tokens("x") is None
        fake.progress = None
        until = time.monotonic() + TIMEOUT_S
        while server.progress() is not None:
            assert time.monotonic() < until
            server.wait(1.0)
        assert server.model().name == "fake-1b"
        server.choose(ModelInfo("other"))
        assert server.model().name == "other"


def texts(server: Server, question: str) -> list[str]:
    deltas = server.stream([{"role": "user", "content": question}], {})
    return [delta.text or delta.note for delta in deltas if delta.text or delta.note]


def test_where_it_ends_before_the_answer_another_one_answers(home: Path) -> None:
    weights = home / "weights"
    with FakeOpenAI() as own, FakeOpenAI() as fake:
        with announced(described(fake, weights)):
            server = _joined(fake, weights, own)
        fake.scripts["hello"] = Stream.die
        note, *answer = texts(server, "hello")
        assert "has ended: one of this chat's own starts" in note
        assert "".join(answer) == "Hello there."
        assert "".join(texts(server, "hello")) == "Hello there.", "and from then on"
        server.close()


def _joined(fake: FakeOpenAI, weights: Path, own: FakeOpenAI) -> SharedServer:
    with joined(fake, weights, own) as (server, _):
        pass
    # its announcement goes with the caller's block, as that of a server that dies
    assert isinstance(server, SharedServer)
    return SharedServer(
        server._running, RunningModel("fake-1b", ""), server._client.again(), server._start_own
    )


def test_where_it_ends_in_the_middle_that_is_said(home: Path) -> None:
    weights = home / "weights"
    with FakeOpenAI() as own, FakeOpenAI() as fake:
        with announced(described(fake, weights)):
            server = _joined(fake, weights, own)
            with pytest.raises(WorkerLost, match="lost the connection"):
                texts(server, "die")  # it still runs: an accident, and no end
        with pytest.raises(WorkerLost, match="one of this chat's own starts"):
            texts(server, "die")
        assert "".join(texts(server, "hello")) == "Hello there."
        assert len(own.bodies) == 1
        server.close()


def test_one_that_ends_while_it_loads_is_replaced(home: Path) -> None:
    weights = home / "weights"
    with FakeOpenAI() as own:
        with FakeOpenAI() as fake, announced(described(fake, weights)):
            fake.progress = {"loaded_bytes": 1, "total_bytes": 2}
            server = _joined(fake, weights, own)
            assert server.progress() is not None
        until = time.monotonic() + TIMEOUT_S
        while server.progress() is not None:
            assert time.monotonic() < until
            server.wait(0.1)
        assert "".join(texts(server, "hello")) == "Hello there."
        server.close()
