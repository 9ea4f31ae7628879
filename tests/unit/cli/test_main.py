"""The boundary of the process: commands, exit codes, one line on stderr."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from chatserve import __version__
from chatserve.cli import main as cli
from chatserve.errors import (
    CannotBind,
    CrashLoop,
    DoesNotFit,
    ModelLoadError,
    RegistrationFailed,
    UsageError,
    WorkerLost,
)

HEAVY = ("torch", "transformers", "httpx", "prompt_toolkit", "rich", "pydantic", "fastapi")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A command named `chat` whose `main` each test fills."""
    module = types.SimpleNamespace(main=lambda argv: 0)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    return module


def failing_with(error: BaseException) -> types.FunctionType:
    def main(argv: list[str]) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("wrong flag"), 2, "chatserve: wrong flag\n"),
        (ModelLoadError("no shard"), 3, "chatserve: no shard\n"),
        (DoesNotFit("too big"), 4, "chatserve: too big\n"),
        (CannotBind("in use"), 5, "chatserve: in use\n"),
        (RegistrationFailed("refused"), 6, "chatserve: refused\n"),
        (CrashLoop("crashes"), 7, "chatserve: crashes\n"),
        (WorkerLost("went\naway\x1b[2J"), 1, "chatserve: went away\n"),
        (OSError(28, "No space left on device"), 1, "chatserve: No space left on device\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "chatserve: x: No such file\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(
    error: BaseException,
    code: int,
    line: str,
    command: types.SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command.main = failing_with(error)
    assert cli.main(["chat"]) == code
    assert capsys.readouterr().err == line


def test_a_bug_is_one_line_too_and_a_traceback_only_with_debug(
    command: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main = failing_with(ZeroDivisionError("oops"))
    assert cli.main(["chat"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("chatserve: internal error: ZeroDivisionError: oops")
    assert err.count("\n") == 1
    assert cli.main(["chat", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_arguments_and_exit_code_are_passed_through(command: types.SimpleNamespace) -> None:
    seen: list[list[str]] = []
    command.main = lambda argv: seen.append(argv) or 7
    assert cli.main(["chat", "--flag", "x"]) == 7
    assert seen == [["--flag", "x"]]


def test_unknown_command_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chta"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("chatserve: unknown command 'chta'; there are chat, serve")
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"chatserve {__version__}\n"


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["-m", "chatserve", "--help"],
        ["-m", "chatserve", "--version"],
        ["-m", "chatserve.cli", "--help"],
        ["-m", "chatserve", "chat", "--help"],
    ],
)
def test_help_and_version_answer(argv: list[str]) -> None:
    result = run(*argv)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout


@pytest.mark.parametrize(
    "module", ["chatserve.cli.chat", "chatserve.cli.main", "chatserve.cli.commands.chat"]
)
def test_the_chat_starts_without_heavy_imports(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run("-c", code).stdout == "[]\n"


def test_python_m_chatserve_cli_is_chat() -> None:
    assert "usage: chatserve chat" in run("-m", "chatserve.cli", "--help").stdout
    result = run("-m", "chatserve.cli", "--modle-path", "x")
    assert result.returncode == 2
    assert result.stderr == (
        "chatserve: unknown flag --modle-path; did you mean --model-path? "
        "`chatserve chat --help` lists the flags\n"
    )


def test_a_reader_that_leaves_is_no_error() -> None:
    """`chatserve … | head -0`: no traceback, no complaint at exit."""
    with subprocess.Popen(
        [sys.executable, "-m", "chatserve", "config"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
