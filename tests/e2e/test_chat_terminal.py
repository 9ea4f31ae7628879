"""`chatserve chat` as a person sees it: in a pty, whole screens compared; and in pipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from tests.e2e import fake_chat
from tests.e2e.terminal import Terminal
from tests.fake_openai import FakeOpenAI

CTRL_C, CTRL_D, ENTER, ESC, UP = "\x03", "\x04", "\r", "\x1b", "\x1b[A"
BANNER = "/help lists commands, Ctrl-D leaves"
STATUS = "fake-1b · cpu · float32 · 8-bit"
REPOSITORY = Path(__file__).parents[2]

Start = Callable[..., Terminal]


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(REPOSITORY), "CHATSERVE_HOME": str(tmp_path / "home")}


@pytest.fixture
def start(env: Mapping[str, str]) -> Iterator[Start]:
    """Starts chats in terminals and closes those in the end."""
    terminals = []

    def start_chat(*flags: str, deeds: tuple[str, ...] = (), **more: str) -> Terminal:
        argv = [fake_chat.__file__, *deeds, "--", *flags]
        terminals.append(Terminal(argv, {**env, **more}))
        return terminals[-1]

    yield start_chat
    for terminal in terminals:
        terminal.close()


def ready(terminal: Terminal) -> Terminal:
    terminal.wait_for(STATUS)
    return terminal


def test_a_whole_chat(start: Start) -> None:
    terminal = ready(start("--style", "simple"))
    assert terminal.lines[:2] == [BANNER, ">"]
    terminal.type("hello" + ENTER)
    terminal.wait_for_screen(BANNER, "> hello", "Hello there.", "", ">", *[""] * 10, STATUS)
    terminal.type("chinese" + ENTER)
    terminal.wait_for_screen(
        BANNER,
        "> hello",
        "Hello there.",
        "",
        "> chinese",
        "你好，世界🌍",
        "",
        ">",
        *[""] * 7,
        STATUS,
    )
    terminal.type("/exit" + ENTER)
    assert terminal.wait_for_end() == 0
    assert terminal.has_restored_settings()


def test_markdown_is_drawn(start: Start) -> None:
    terminal = ready(start())
    terminal.type("markdown" + ENTER)
    terminal.wait_for_screen(
        BANNER,
        "> markdown",
        "                           Title",
        "",
        "Some bold text.",
        "",
        " • one",
        " • two",
        "",
        ">",
        *[""] * 5,
        STATUS,
    )
    assert terminal.screen.buffer[4][5].bold


def test_speed_is_in_the_status_line(start: Start) -> None:
    terminal = ready(start())
    terminal.type("slow" + ENTER)
    terminal.wait_for("> slow", STATUS + " · ", " tokens/s")
    assert 10 < float(terminal.text.split()[-2]) < 110


@pytest.mark.parametrize("style", ["simple", "rich"])
def test_ctrl_c_stops_the_answer_and_keeps_it(style: str, start: Start) -> None:
    terminal = ready(start("--style", style))
    terminal.type("endless" + ENTER)
    terminal.wait_for("one two three")
    terminal.type(CTRL_C)
    terminal.wait_for_screen(
        BANNER,
        "> endless",
        "one two three",
        "",
        "stopped; /continue goes on, /regen repeats, Ctrl-C leaves",
        ">",
        *[""] * 9,
        STATUS,
    )
    terminal.type("what did I ask?" + ENTER)
    terminal.wait_for("user: endless", "assistant: one two three", "user: what did I ask?")
    terminal.type(CTRL_D)
    assert terminal.wait_for_end() == 0
    assert terminal.has_restored_settings()


def test_ctrl_c_at_the_prompt_clears_the_line(start: Start) -> None:
    terminal = ready(start())
    terminal.type("wrong")
    terminal.wait_for("> wrong")
    terminal.type(CTRL_C)
    terminal.wait_for_screen(BANNER, ">", *[""] * 13, STATUS)
    terminal.type(CTRL_C)
    terminal.wait_for("Ctrl-D or /exit leaves")


def test_keys_typed_during_an_answer_wait_unseen(start: Start) -> None:
    terminal = ready(start("--style", "simple"))
    terminal.type("endless" + ENTER)
    terminal.wait_for("one two three")
    terminal.type("hello")
    terminal.type(CTRL_C)
    terminal.wait_for("stopped; /continue goes on, /regen repeats, Ctrl-C leaves", "> hello")
    assert terminal.lines[2] == "one two three"


def test_the_prompt_is_there_while_the_model_loads(start: Start) -> None:
    terminal = start(deeds=("load",))
    loading = "loading fake-1b ██████████░░░░░░░░░░  50%  135 / 270 MB"
    terminal.wait_for_screen(BANNER, ">", *[""] * 13, loading)
    terminal.type("hello" + ENTER)
    terminal.wait_for_screen(BANNER, "> hello", loading)
    terminal.type(CTRL_C)
    terminal.wait_for_screen(
        BANNER, "> hello", "stopped; /regen asks again, Ctrl-C leaves", ">", *[""] * 11, loading
    )


def test_a_server_that_fails_ends_the_prompt_with_its_exit_code(start: Start) -> None:
    terminal = start(deeds=("3:no shard model-00002 in /weights",))
    assert terminal.wait_for_end() == 3
    assert "chatserve: no shard model-00002 in /weights" in terminal.lines
    assert terminal.has_restored_settings()


def test_a_server_that_dies_later_ends_the_prompt(start: Start) -> None:
    terminal = ready(start())
    server_of(terminal).kill()
    assert terminal.wait_for_end() == 1
    assert "the server was killed by SIGKILL" in "\n".join(terminal.lines)
    assert terminal.has_restored_settings()


def test_escapes_change_nothing_but_text(start: Start) -> None:
    terminal = ready(start("--style", "simple"))
    terminal.type("escapes" + ENTER)
    terminal.wait_for_screen(BANNER, "> escapes", "safe 你好", "", ">", *[""] * 10, STATUS)
    assert terminal.screen.title == ""
    raw = ready(start("--raw"))
    raw.type("escapes" + ENTER)
    raw.wait_for("fe 你")
    assert raw.screen.title == "owned"


def test_several_lines_and_blocks(start: Start) -> None:
    terminal = ready(start("--style", "simple"))
    terminal.type('"""one' + ENTER + "two" + ENTER + '"""' + ENTER)
    terminal.wait_for_screen(
        BANNER, '> """one', ". two", '. """', "user: one", "two", "", ">", *[""] * 7, STATUS
    )


def test_lines_are_remembered_from_chat_to_chat(start: Start, tmp_path: Path) -> None:
    first = ready(start("--style", "simple"))
    first.type("hello" + ENTER)
    first.wait_for("Hello there.")
    first.type(CTRL_D)
    assert first.wait_for_end() == 0
    second = ready(start("--no-save"))
    second.type(UP)
    second.type("x" + ENTER)
    second.wait_for("user: x")
    third = ready(start())
    third.type(UP)
    third.wait_for("> hello")
    assert (tmp_path / "home" / "lines.jsonl").read_text() == '"hello"\n'


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("question", ["", "endless" + ENTER])
def test_a_signal_restores_the_terminal_and_stops_the_server(
    number: signal.Signals, question: str, start: Start
) -> None:
    terminal = ready(start())
    terminal.type(question)
    if question:
        terminal.wait_for("one two three")
    server = server_of(terminal)
    terminal.child.kill(number)
    assert terminal.wait_for_end() == 128 + number
    assert terminal.has_restored_settings()
    assert not server.is_running()


def test_kill_9_leaves_no_server(start: Start) -> None:
    terminal = ready(start())
    server = server_of(terminal)
    terminal.child.kill(signal.SIGKILL)
    gone, alive = psutil.wait_procs([server], timeout=5)
    assert (gone, alive) == ([server], [])


def server_of(terminal: Terminal) -> psutil.Process:
    (server,) = psutil.Process(terminal.child.pid).children()
    return server


def test_joining_a_running_server(start: Start) -> None:
    with FakeOpenAI("sk-right") as server:
        terminal = ready(start("--base-url", server.url, CHATSERVE_API_KEY="sk-right"))
        assert psutil.Process(terminal.child.pid).children() == []
        terminal.type("hello" + ENTER)
        terminal.wait_for("Hello there.")
        terminal.type(CTRL_D)
        assert terminal.wait_for_end() == 0
        assert server.bodies[0]["temperature"] == 0.7
        refused = start("--base-url", server.url)
        assert refused.wait_for_end() == 1
        assert "chatserve: wrong key" in "\n".join(refused.lines)


def run(
    env: Mapping[str, str], *flags: str, deeds: tuple[str, ...] = (), stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, fake_chat.__file__, *deeds, "--", *flags],
        env={**os.environ, **env},
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize(
    ("flags", "stdin", "out"),
    [
        (["-p", "hello"], None, "Hello there.\n"),
        (["--prompt=chinese"], None, "你好，世界🌍\n"),
        (["-p", "markdown"], None, "# Title\n\nSome **bold** text.\n\n- one\n- two\n"),
        ([], "hello\n", "Hello there.\n"),
        (["-p", "Shout:"], "quiet\n", "user: Shout:\n\nquiet\n"),
        (["-p", "escapes"], None, "safe 你好\n"),
        (["-p", "x", "--conv-system-msg", "be brief"], None, "system: be brief\nuser: x\n"),
        (["-p", "hello", "--style", "programmatic"], None, "[!OP:ASSISTANT]: Hello there.\n"),
    ],
)
def test_one_answer_on_stdout(
    flags: list[str], stdin: str | None, out: str, env: Mapping[str, str]
) -> None:
    result = run(env, *flags, stdin=stdin)
    assert (result.returncode, result.stdout, result.stderr) == (0, out, "")


@pytest.mark.parametrize(
    ("question", "out", "message"),
    [
        ("too long", "", "chatserve: prompt has 9 tokens\n"),
        ("full", "", "chatserve: queue is full for long\n"),
        ("failing", "half an\n", "chatserve: worker died\n"),
    ],
)
def test_a_failed_request_is_exit_code_1(
    question: str, out: str, message: str, env: Mapping[str, str]
) -> None:
    result = run(env, "-p", question)
    assert (result.returncode, result.stdout, result.stderr) == (1, out, message)


@pytest.mark.parametrize("code", [2, 3, 4, 5, 7])
def test_the_servers_exit_code_is_passed_through(code: int, env: Mapping[str, str]) -> None:
    result = run(env, "-p", "hello", deeds=(f"{code}:no such thing",))
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr == "chatserve: no such thing\n"


def test_a_limited_answer_is_noted_on_stderr(env: Mapping[str, str]) -> None:
    result = run(env, "-p", "long", "--max-new-tokens", "16")
    assert (result.returncode, result.stdout) == (0, "As I was say\n")
    assert result.stderr == "the answer stopped at --max-new-tokens 16\n"


def test_debug_shows_the_servers_log(env: Mapping[str, str]) -> None:
    assert "log: all is well\n" in run(env, "-p", "hello", "--debug").stderr


def test_a_full_disk_is_exit_code_1(env: Mapping[str, str]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, fake_chat.__file__, "--", "-p", "hello"],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (result.returncode, result.stderr) == (1, "chatserve: No space left on device\n")


def test_ctrl_c_during_one_answer_is_exit_code_130(env: Mapping[str, str]) -> None:
    with subprocess.Popen(
        [sys.executable, fake_chat.__file__, "--", "-p", "endless"],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(len("one two three")) == "one two three"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "\n"
        assert process.stderr.read() == ""
    assert process.returncode == 130


def test_a_program_chats_in_fastchats_protocol(env: Mapping[str, str]) -> None:
    end = " __END_OF_A_MESSAGE_47582648__\n"
    result = run(env, "--style", "programmatic", stdin=f"hello{end}and\nmore{end}")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (
        "[!OP:USER]: hello\n[!OP:ASSISTANT]: Hello there.\n"
        "[!OP:USER]: and\nmore\n[!OP:ASSISTANT]: "
        "user: hello\nassistant: Hello there.\nuser: and\nmore\n"
    )  # fmt: skip


def test_a_reader_that_has_enough_is_no_error(env: Mapping[str, str]) -> None:
    """`chatserve chat -p … | head -c 3`"""
    with subprocess.Popen(
        [sys.executable, fake_chat.__file__, "--", "-p", "slow"],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(3) == b"0 1"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_markdown_in_a_pipe_has_no_frames(env: Mapping[str, str]) -> None:
    result = run(env, "-p", "markdown", "--style", "rich")
    assert result.stdout.count("Title") == 1
    assert "\x1b[K" not in result.stdout and "\r" not in result.stdout


def test_no_word_is_cut_on_a_narrow_terminal(start: Start) -> None:
    terminal = ready(start("--style", "simple"))
    terminal.type("/help" + ENTER)
    terminal.wait_for(
        "/name [NAME]        call this chat NAME, for --resume;\n"
        + " " * 20
        + "without NAME: show it",
        "`!!` works like `/`; a leading space sends a line that\nbegins with either.",
    )
