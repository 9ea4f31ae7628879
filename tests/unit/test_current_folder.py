"""What a process of ours imports never comes from the folder that the user happens to be in."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from chatserve.cli.commands.chat import server_command
from chatserve.config import ChatConfig
from chatserve.grammar.trial_process import Passed, TrialProcess
from chatserve.models.templates.render_process import RenderProcess
from chatserve.server.launch import WORKER_COMMAND
from tests.grammars import BYTES

HIJACKED = 'raise SystemExit("imported from the current folder")\n'


@pytest.fixture
def hostile_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("random", "json", "chatserve"):
        (tmp_path / f"{name}.py").write_text(HIJACKED, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", [WORKER_COMMAND, server_command(ChatConfig())[:4]])
def test_a_server(command: Sequence[str], hostile_folder: Path) -> None:
    result = subprocess.run(
        [*command, "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: ")


@pytest.mark.usefixtures("hostile_folder")
def test_the_process_that_tries_grammars() -> None:
    trial = TrialProcess(lambda: BYTES)
    try:
        assert isinstance(trial.run("regex", "a+", after_space=False), Passed)
    finally:
        trial.end()


@pytest.mark.usefixtures("hostile_folder")
def test_the_process_that_renders_chats() -> None:
    process = RenderProcess()
    try:
        process.compile("{{ 6 * 7 }}")
        assert process.render(100, {}) == "42"
    finally:
        process.close()
