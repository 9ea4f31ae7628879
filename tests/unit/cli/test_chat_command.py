"""`chatserve chat`: from flags to the server's command line and to requests."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from chatserve.cli import piped_input
from chatserve.cli.asking import ChatOptions
from chatserve.cli.commands import chat
from chatserve.cli.person import HISTORY_FILE, line_editor
from chatserve.cli.request_settings import options_of
from chatserve.cli.screens import is_rich
from chatserve.cli.transcript import Transcript
from chatserve.config import ChatConfig, build
from chatserve.errors import UsageError
from chatserve.flags import CommandParser


def config_of(*argv: str) -> ChatConfig:
    flags = CommandParser("chatserve chat", "", ChatConfig).flags(argv)
    return build(ChatConfig, flags, environ={})


def refusal(*argv: str) -> str:
    def never(config: ChatConfig) -> list[str]:
        raise AssertionError("a server would have been started")

    with pytest.raises(UsageError) as caught:
        chat.main([*argv], server_command=never)
    return caught.value.message


def test_the_server_gets_weights_and_model_flags_on_a_free_loopback_port() -> None:
    command = chat.server_command(
        config_of("--model-path", "/weights", "--load-8bit", "--device", "cpu", "--conv-template",
                  "vicuna_v1.1", "--context-length", "512", "--debug")
    )  # fmt: skip
    assert command[:4] == [sys.executable, "-P", "-m", "chatserve.server"]
    assert command[-2:] == ["--", "/weights"]
    assert "--no-prepare-grammars" in command, "they would only take memory"
    assert {"--host=127.0.0.1", "--port=0", "--load-8bit", "--device=cpu", "--debug"} < {*command}
    assert {"--conv-template=vicuna_v1.1", "--context-length=512"} < {*command}


def test_settings_of_the_chat_stay_with_the_chat() -> None:
    command = chat.server_command(config_of("--conv-system-msg", "x", "--temperature", "1", "-p=y"))
    assert command[-1] == "--"
    assert not [word for word in command if "system" in word or "temp" in word or "prompt" in word]


def test_default_temperature_depends_on_who_asks() -> None:
    assert options_of(config_of(), 0.7).sampling == {"temperature": 0.7}
    assert options_of(config_of("--temperature", "0"), 0.7).sampling == {"temperature": 0.0}
    assert options_of(config_of("--use-generation-config"), 0.7).sampling == {}


def test_only_settings_that_were_made_are_sent() -> None:
    options = options_of(
        config_of("--top-p", "0.9", "--repetition_penalty", "1.1", "--max-new-tokens", "5",
                  "--seed", "7", "--no-history"), 0.0,
    )  # fmt: skip
    assert options.sampling == {
        "temperature": 0.0, "top_p": 0.9, "repetition_penalty": 1.1, "max_tokens": 5, "seed": 7,
    }  # fmt: skip
    assert not options.with_history


def test_an_answer_has_fastchats_limit_by_default() -> None:
    options = options_of(config_of(), 0.0)
    assert options.wished_max_tokens == 512
    assert "max_tokens" not in options.sampling


def test_weights_given_twice_must_agree() -> None:
    for argv in (
        ["/a", "--model-path", "/b"], ["--model-path", "/b", "/a"],
        ["--model-path", "/a", "--model-name", "/b"], ["--model=/a", "--model=/b"],
    ):  # fmt: skip
        assert "weights are given twice: /" in refusal(*argv)
    commands = []

    def record(config: ChatConfig) -> list[str]:
        commands.append(config.model)
        raise UsageError("far enough")

    for argv in (["/a", "--model-path", "/a"], ["--model", "/a", "--model-name", "/a"]):
        with pytest.raises(UsageError, match="far enough"):
            chat.main(argv, server_command=record)
    assert commands == ["/a", "/a"]


def test_wrong_settings_are_refused_before_a_server_starts() -> None:
    assert "--load-8bit is a matter of the server" in refusal(
        "--base-url", "http://127.0.0.1:1", "--load-8bit"
    )
    assert "--temperature: 3.0 is out of range: it must be from 0 to 2;" in refusal(
        "--temperature", "3"
    )
    assert "--style rich" in refusal("--style", "rich", "--raw")
    assert "is not a server's URL" in refusal("--base-url", "localhost:8000")


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes bytes the piped standard input."""
    files = []

    def pipe(data: bytes) -> None:
        theirs, ours = os.pipe()
        os.write(ours, data)
        os.close(ours)
        files.append(os.fdopen(theirs, "r"))
        monkeypatch.setattr(sys, "stdin", files[-1])

    yield pipe
    for file in files:
        file.close()


def question(*argv: str) -> str:
    display = chat.Display(chat.PlainDrawer(io.StringIO()), io.StringIO())
    return chat._question(config_of(*argv), display)


def test_prompt_and_piped_text_are_joined(stdin: Any) -> None:
    stdin("\ufeffthe text 你好\n".encode())
    assert question("-p", "Summarise:") == "Summarise:\n\nthe text 你好"
    stdin(b"only piped\n")
    assert question() == "only piped"
    stdin(b"")
    assert question("-p", "only prompt") == "only prompt"


def test_no_standard_input_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert question("-p", "x") == "x"
    with pytest.raises(UsageError, match="there is no prompt"):
        question()


def test_useless_input_is_refused(stdin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(b" \n")
    with pytest.raises(UsageError, match="there is no prompt"):
        question()
    stdin(b"ab\xff")
    with pytest.raises(UsageError, match=r"is no UTF-8 text \(byte 2\); convert it"):
        question()
    monkeypatch.setattr(piped_input, "MAX_BYTES", 3)
    stdin(b"abcd")
    with pytest.raises(UsageError, match="over 3 bytes"):
        question()


def test_waiting_for_input_that_does_not_come_is_explained(
    stdin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piped_input.select, "select", lambda *_: ([], [], []))
    stdin(b"late")
    err = io.StringIO()
    display = chat.Display(chat.PlainDrawer(io.StringIO()), err)
    assert chat._question(config_of(), display) == "late"
    assert "reading the prompt from standard input" in err.getvalue()


def test_markdown_only_on_a_terminal_with_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert not is_rich(config_of())
    assert is_rich(config_of("--style", "rich"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert is_rich(config_of())
    assert not is_rich(config_of("--raw"))
    assert not is_rich(config_of("--style", "simple"))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not is_rich(config_of())


def test_history_is_kept_unless_told_not_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path))
    kept = []
    monkeypatch.setattr(
        "chatserve.cli.line_editor.LineEditor.__init__",
        lambda self, status, history, *_, **__: kept.append(history),
    )
    display = chat.Display(chat.PlainDrawer(io.StringIO()), io.StringIO())
    loop = chat.Chat(None, display, Transcript(), ChatOptions())  # type: ignore[arg-type]
    line_editor(loop, display, config_of())
    line_editor(loop, display, config_of("--no-save"))
    for history in kept:
        history.store_string("typed")
    assert [path.name for path in tmp_path.iterdir()] == [HISTORY_FILE]
    assert (tmp_path / HISTORY_FILE).read_text() == '"typed"\n'
