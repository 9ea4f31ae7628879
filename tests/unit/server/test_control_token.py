"""The secret is private from its first byte on, and comes from the environment or its file."""

from __future__ import annotations

import secrets
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from chatserve.errors import UsageError
from chatserve.server.control_token import own_token, shared_token


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CHATSERVE_CONTROL_TOKEN", raising=False)
    return tmp_path / "home" / "control-token"


def test_environment_wins(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATSERVE_CONTROL_TOKEN", "from-environment")
    assert own_token() == shared_token() == "from-environment"
    assert not file.exists()


def test_controller_makes_a_private_file_and_workers_read_it(file: Path) -> None:
    token = own_token()
    assert len(token) >= 40
    assert own_token() == shared_token() == token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_controllers_that_start_together_have_one_token(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes while the first has settled on its token, and nobody can read it yet."""
    draw = secrets.token_urlsafe
    seconds: list[str] = []

    def draw_late(num_bytes: int) -> str:
        monkeypatch.setattr(secrets, "token_urlsafe", draw)
        seconds.append(own_token())
        return draw(num_bytes)

    monkeypatch.setattr(secrets, "token_urlsafe", draw_late)
    assert [own_token()] == seconds
    assert shared_token() == seconds[0]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]


def test_processes_that_start_together_have_one_token(file: Path) -> None:
    code = (
        "import sys; from chatserve.server.control_token import own_token\n"
        "sys.stdin.read(); print(own_token())"
    )
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    told = {process.communicate(timeout=60)[0] for process in processes}
    assert told == {shared_token() + "\n"}


def test_worker_without_a_token(file: Path) -> None:
    with pytest.raises(UsageError, match="CHATSERVE_CONTROL_TOKEN"):
        shared_token()
    assert not file.exists()


def test_file_that_others_can_read(file: Path) -> None:
    own_token()
    file.chmod(0o640)
    for read in (own_token, shared_token):
        with pytest.raises(UsageError, match="chmod 600"):
            read()


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe"])
def test_file_that_holds_no_token(file: Path, content: bytes) -> None:
    own_token()
    file.write_bytes(content)
    with pytest.raises(UsageError, match="control-token"):
        own_token()


def test_home_that_cannot_be_made(file: Path) -> None:
    file.parent.write_text("a file")
    with pytest.raises(UsageError, match="CHATSERVE_CONTROL_TOKEN"):
        own_token()
