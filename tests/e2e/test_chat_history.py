"""Chats that outlive their terminal: killed, on full and read-only disks, gone on with later."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.e2e import fake_chat
from tests.e2e.terminal import Terminal

CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"
STATUS = "fake-1b · cpu · float32 · 8-bit"
REPOSITORY = Path(__file__).parents[2]
# in a chat that begins so, no file may grow past so many bytes, as if the disk were full
LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192));"
# for root no folder is read-only, unless it gives its capabilities back (version 3, none of them)
UNPRIVILEGED = (
    "import ctypes; ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), "
    "(ctypes.c_uint32 * 6)()) if {is_root} else None;"
)
RUN = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"

Start = Callable[..., Terminal]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def env(home: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(REPOSITORY), "CHATSERVE_HOME": str(home)}


@pytest.fixture
def start(env: Mapping[str, str]) -> Iterator[Start]:
    terminals = []

    def start_chat(*flags: str, before: tuple[str, ...] = ()) -> Terminal:
        argv = [*before, fake_chat.__file__, "--", "--style", "simple", *flags]
        terminals.append(Terminal(argv, env))
        return terminals[-1]

    yield start_chat
    for terminal in terminals:
        terminal.close()


def ask(terminal: Terminal, question: str, *answer: str) -> None:
    """And wait for all of `answer` and the prompt that comes back, empty, above the status."""
    terminal.clear()
    terminal.type(question + ENTER)
    terminal.wait_for(*answer, "\n>\n")


def ready(terminal: Terminal) -> Terminal:
    terminal.wait_for(STATUS)
    return terminal


def killed_rounds(folder: Path, rounds: int, *flags: str) -> list[dict[str, object]]:
    file = folder / "chats" / "chats.db"
    result = subprocess.run(
        [sys.executable, "-m", "tests.killed_chats", str(file), str(rounds), *flags],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == rounds and all(line["killed"] for line in lines), result.stderr
    return lines


def test_no_acknowledged_turn_is_lost_to_kill_9(tmp_path: Path) -> None:
    check_nothing_lost(killed_rounds(tmp_path, 20))


@pytest.mark.soak
def test_no_acknowledged_turn_is_lost_to_kill_9_three_hundred_times(tmp_path: Path) -> None:
    check_nothing_lost(killed_rounds(tmp_path, 300))


def check_nothing_lost(lines: list[dict[str, object]]) -> None:
    assert [line for line in lines if line["lost"] or line["integrity"] != "ok"] == []
    print(f"{len(lines)} kills, {lines[-1]['acknowledged']} turns, 0 lost")


def test_chats_that_do_not_save_every_turn_would_lose_some(tmp_path: Path) -> None:
    lines = killed_rounds(tmp_path, 5, "--careless")
    assert any(line["lost"] for line in lines)


def test_a_chat_that_was_killed_is_gone_on_with(start: Start) -> None:
    first = ready(start())
    ask(first, "hello", "Hello there.")
    first.child.kill(signal.SIGKILL)
    assert first.wait_for_end() == -signal.SIGKILL
    second = start("--resume", "last")
    second.wait_for("USER: hello", "ASSISTANT: Hello there.", STATUS)
    ask(second, "and?", "user: hello", "assistant: Hello there.", "user: and?")
    second.type(CTRL_D)
    second.wait_for("goes on with this chat")
    assert second.wait_for_end() == 0


def test_a_signal_in_the_middle_of_an_answer_keeps_what_has_come(start: Start) -> None:
    first = ready(start())
    first.type("endless" + ENTER)
    first.wait_for("one two three")
    first.child.kill(signal.SIGHUP)
    assert first.wait_for_end() == 128 + signal.SIGHUP
    second = start("--resume", "last")
    second.wait_for("USER: endless", "ASSISTANT: one two three", STATUS)
    ask(second, "more", "assistant: one two three", "user: more")


def test_the_name_that_is_told_finds_the_chat(start: Start) -> None:
    first = ready(start())
    ask(first, "hello", "Hello there.")
    ask(first, "/name my trip", "--resume my trip goes on with this chat")
    ask(first, "/sessions", "my trip  20", "  hello")
    ask(first, "/reset", "the conversation is empty")
    ask(first, "chinese", "你好，世界🌍")
    first.type(CTRL_D)
    first.wait_for("chatserve chat --resume ", "goes on with this chat")
    name = first.text.split("--resume ")[1].split()[0]
    assert first.wait_for_end() == 0
    second = start("--resume", name)
    second.wait_for("USER: chinese", "ASSISTANT: 你好", STATUS)
    assert "hello" not in second.text
    third = start("--resume", "my trip")
    third.wait_for("USER: hello", "ASSISTANT: Hello there.", STATUS)


def test_no_save_leaves_nothing(start: Start, home: Path) -> None:
    terminal = ready(start("--no-save"))
    ask(terminal, "hello", "Hello there.")
    ask(terminal, "/sessions", "error: no chat is kept (--no-save)")
    ask(terminal, "/name x", "error: this chat is not kept (--no-save)")
    terminal.type(CTRL_D)
    assert terminal.wait_for_end() == 0
    assert "--resume" not in terminal.text
    assert not home.exists()


def test_a_full_disk_costs_one_warning(start: Start, home: Path) -> None:
    check_one_warning(start(before=("-c", LIMITED + RUN)))
    assert (home / "chats").is_dir()


def test_a_read_only_folder_costs_one_warning(start: Start, home: Path) -> None:
    home.mkdir(mode=0o500)
    code = UNPRIVILEGED.format(is_root=os.geteuid() == 0) + RUN
    check_one_warning(start(before=("-c", code)))
    assert list(home.iterdir()) == []


def test_a_folder_that_cannot_be_made_costs_one_warning(start: Start, home: Path) -> None:
    home.mkdir()
    (home / "chats").write_text("")
    check_one_warning(start())


def check_one_warning(terminal: Terminal) -> None:
    """Where typed lines cannot be remembered, either, that is one more, of its own."""
    ready(terminal)
    warning = "this chat goes on, but is not kept"
    ask(terminal, "hello", "Hello there.", warning)
    for _ in range(2):
        ask(terminal, "hello", "Hello there.")
        assert warning not in terminal.text
    terminal.type(CTRL_D)
    assert terminal.wait_for_end() == 0
    assert "--resume" not in terminal.text


def test_a_damaged_file_is_told_in_one_line_and_put_aside(start: Start, home: Path) -> None:
    first = ready(start())
    ask(first, "hello", "Hello there.")
    first.type(CTRL_D)
    assert first.wait_for_end() == 0
    file = home / "chats" / "chats.db"
    os.truncate(file, 6000)
    damaged = file.read_bytes()
    second = ready(start())
    second.wait_for("the kept chats were damaged")
    (aside,) = (home / "chats").glob("chats.db.damaged-*")
    assert aside.read_bytes() == damaged
    ask(second, "hello", "Hello there.")
    second.type(CTRL_D)
    second.wait_for("--resume")
    assert second.wait_for_end() == 0
    assert aside.read_bytes() == damaged


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "holiday"], "--resume holiday: no chat has this name or id; "),
        (["--resume", "x\x1b[2J"], "--resume x: no chat has this name or id; "),
    ],
)
def test_a_chat_that_is_not_there_costs_no_server(
    flags: list[str], message: str, start: Start
) -> None:
    terminal = start(*flags)
    assert terminal.wait_for_end() == 2
    assert message in " ".join(terminal.text.split())


def test_only_people_go_on_with_chats(env: Mapping[str, str]) -> None:
    result = subprocess.run(
        [sys.executable, fake_chat.__file__, "--", "--resume", "last", "-p", "hello"],
        env={**os.environ, **env}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "--resume is for a chat in a terminal" in result.stderr
