"""`chatserve completion`: the shells themselves are asked what they would complete."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chatserve.cli import main as cli
from chatserve.cli.commands.completion import SHELLS, main, script
from chatserve.cli.session_store import Session, SessionStore
from chatserve.cli.transcript import Transcript
from chatserve.errors import UsageError
from chatserve.flags import REFUSED_FLAGS

ASK = """
source ./script
COMP_WORDS=("$@")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_shtab_chatserve chatserve "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the script for bash, and things to complete."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "script").write_text(script("bash"), "utf-8")
    (folder / "vicuna-mine").mkdir()
    (folder / "vicuna.gguf").touch()
    return folder


def completed(folder: Path, *words: str) -> list[str]:
    result = subprocess.run(
        ["bash", "--norc", "-c", ASK, "ask", "chatserve", *words], cwd=folder, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return sorted(set(result.stdout.split()))


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_commands_flags_choices_models_and_files(folder: Path) -> None:
    assert completed(folder, "p") == ["plan", "ps", "pull"]
    assert set(completed(folder, "")) >= {*cli.COMMANDS}
    assert completed(folder, "chat", "--load-") == ["--load-4bit", "--load-8bit"]
    assert completed(folder, "chat", "--device", "c") == ["cpu", "cuda"]
    assert completed(folder, "chat", "vicuna-m") == ["vicuna-mine"]
    assert {"vicuna.gguf", "vicuna-mine", "vicuna-7b-v1.5"} <= {*completed(folder, "chat", "vic")}
    assert completed(folder, "serve", "--device", "cpu", "tinyl") == ["tinyllama"]
    assert completed(folder, "pull", "smollm2-135") == ["smollm2-135m"]
    assert completed(folder, "chat", "-p", "x", "--file", "vicuna.g") == ["vicuna.gguf"]
    assert completed(folder, "completion", "") == sorted(SHELLS)
    hidden = {*REFUSED_FLAGS, "--_parser"}
    assert not hidden & {*completed(folder, "chat", "--")}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_the_names_of_kept_chats_and_runs_none_of_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    store = SessionStore.of_user()
    for name in ("trip", "trip-2", "two words", "$(touch owned)", "`touch owned`", "other"):
        transcript = Transcript()
        transcript.ask("where to?")
        session = Session()
        store.save(session, transcript, "m")
        store.rename(session, name)
    program = tmp_path / "bin/chatserve"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m chatserve "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    assert completed(folder, "chat", "--resume", "tri") == ["trip", "trip-2"]
    assert completed(folder, "history", "--show", "") == ["last", "other", "trip", "trip-2"]
    assert not (folder / "owned").exists()


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_takes_its_script(shell: str, tmp_path: Path) -> None:
    text = script(shell)
    assert text.isprintable() or "\n" in text
    for command in cli.COMMANDS:
        assert command in text
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    (tmp_path / "script").write_text(text, "utf-8")
    subprocess.run([shell, "-n", "script"], cwd=tmp_path, check=True)


def test_another_shell_is_refused() -> None:
    with pytest.raises(UsageError, match="'tcl' is none of the shells bash, zsh, fish"):
        main(["tcl"])


@pytest.mark.parametrize("command", [*map(tuple, ([name] for name in cli.COMMANDS)),
                                     ("template", "check")])  # fmt: skip
def test_each_command_shows_its_parser_and_does_nothing(command: tuple[str, ...]) -> None:
    assert cli.parser_of(*command).prog == " ".join(("chatserve", *command))
