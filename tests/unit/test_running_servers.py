"""Which servers run here: found while they live, known as dead when they do not, private."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from chatserve.running_servers import (
    RunningModel,
    RunningServer,
    announced,
    full_weights,
    running_servers,
)

ANNOUNCE = """
import sys, time
from chatserve.running_servers import RunningServer, announced
with announced(RunningServer("http://127.0.0.1:1", 0, 1.0, (), "secret")):
    print("told", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path))
    return tmp_path


def server(started_at: float = 1.0, **changes: object) -> RunningServer:
    fields: dict[str, object] = {
        "url": "http://127.0.0.1:8000", "pid": 7, "started_at": started_at,
        "models": (RunningModel("a", "/weights/a"),), "control_token": "secret",
        "flags": ("--load-8bit",),
    }  # fmt: skip
    return RunningServer(**{**fields, **changes})  # type: ignore[arg-type]


def test_it_is_found_while_it_runs() -> None:
    with announced(server()):
        assert running_servers() == [server()]
    assert running_servers() == []


def test_the_youngest_is_first() -> None:
    with announced(server(1.0)), announced(server(3.0)), announced(server(2.0)):
        assert [each.started_at for each in running_servers()] == [3.0, 2.0, 1.0]


def test_what_is_loaded_later_is_told() -> None:
    with announced(server()) as announcement:
        announcement.tell([RunningModel("b", "b")])
        assert running_servers() == [server(models=(RunningModel("b", "b"),))]


def test_only_its_owner_can_read_it(home: Path) -> None:
    with announced(server()):
        folder = home / "running"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    assert list(folder.iterdir()) == []


def test_its_token_is_in_no_log() -> None:
    assert "secret" not in repr(server())


def test_a_killed_server_is_not_found_and_its_file_goes(home: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ANNOUNCE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(running_servers()) == 1
        process.send_signal(signal.SIGKILL)
    assert len(list((home / "running").iterdir())) == 2
    assert running_servers() == []
    assert list((home / "running").iterdir()) == []


def test_what_cannot_be_read_is_passed_over(home: Path) -> None:
    with announced(server()), announced(server(2.0)):
        for file in (home / "running").glob("*.json"):
            if json.loads(file.read_text())["started_at"] == 1.0:
                file.write_text('{"url": ')
        assert [each.started_at for each in running_servers()] == [2.0]


def test_another_machine_with_the_same_home_is_passed_over(home: Path) -> None:
    with announced(server()):
        [file] = (home / "running").glob("*.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), "host": "elsewhere"}))
        assert running_servers() == []


def test_a_folder_that_is_open_to_others_is_not_believed(home: Path) -> None:
    with announced(server()):
        (home / "running").chmod(0o755)
        assert running_servers() == []
        with announced(server(2.0)):
            pass  # nor is anything written there, and the server goes on
        assert len(list((home / "running").iterdir())) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_home_that_takes_no_file_is_no_reason_not_to_serve(home: Path) -> None:
    home.chmod(0o500)
    try:
        with announced(server()) as announcement:
            announcement.tell([])
            assert running_servers() == []
    finally:
        home.chmod(0o700)


def test_a_home_that_is_a_file_is_no_reason_not_to_serve(home: Path) -> None:
    (home / "running").write_text("")
    with announced(server()) as announcement:
        announcement.tell([])
        assert running_servers() == []


def test_the_same_path_in_other_words_is_the_same_weights(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "llama").mkdir()
    monkeypatch.chdir(home)
    found = server(models=(RunningModel("x", str(home / "llama")), RunningModel("y", "alias")))
    assert found.model_of("./llama") == RunningModel("x", full_weights("llama"))
    assert found.model_of("alias") == RunningModel("y", "alias")
    assert found.model_of("other") is None
