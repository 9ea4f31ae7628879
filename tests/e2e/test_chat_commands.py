"""Commands of the chat that own the terminal for a while, in a pty."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e import fake_chat
from tests.e2e.terminal import Terminal

CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"
STATUS = "fake-1b · cpu · float32 · 8-bit"
STOPPED = "stopped; /continue goes on, /regen repeats, Ctrl-C leaves"

Start = Callable[..., Terminal]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    terminals = []

    def start_chat(*flags: str, **more: str) -> Terminal:
        env = {
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "CHATSERVE_HOME": str(tmp_path / "home"),
            **more,
        }
        terminals.append(Terminal([fake_chat.__file__, "--", "--style", "simple", *flags], env))
        terminals[-1].wait_for(STATUS)
        return terminals[-1]

    yield start_chat
    for terminal in terminals:
        terminal.close()


def test_a_question_is_edited_at_the_prompt_and_in_an_editor(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "editor.py"
    script.write_text(
        "import pathlib, sys\n"
        "assert sys.stdin.isatty() and sys.stdout.isatty()\n"
        "file = pathlib.Path(sys.argv[1])\n"
        "print('in the editor', flush=True)\n"
        "file.write_text(file.read_text().upper() + sys.stdin.readline())\n"
    )
    terminal = start(EDITOR=f"{sys.executable} {script}")
    terminal.type("anything" + ENTER)
    terminal.wait_for("user: anything")
    terminal.type("/edit" + ENTER)
    terminal.wait_for("\n> anything")
    terminal.type(" else" + ENTER)
    terminal.wait_for("user: anything else")
    terminal.type("/edit!" + ENTER)
    terminal.wait_for("in the editor")
    terminal.type("typed there" + ENTER)
    terminal.wait_for("user: ANYTHING ELSE", "typed there", STATUS)
    terminal.type(CTRL_D)
    assert terminal.wait_for_end() == 0
    assert terminal.has_restored_settings()


def test_two_answers_side_by_side_are_stopped_and_chosen_from(start: Start) -> None:
    terminal = start()
    terminal.type("/compare fake-1b fake-1b" + ENTER)
    terminal.wait_for("and you choose; /compare off")
    terminal.clear()
    terminal.type("slow" + ENTER)
    terminal.wait_for("fake-1b                      │ fake-1b", "│ 31", "which goes on?")
    rows = [line.split(" │ ") for line in terminal.lines if " │ " in line]
    assert [" ".join(column).split()[2:] for column in zip(*rows, strict=True)] == [
        [str(number) for number in range(32)]
    ] * 2
    terminal.type("2" + ENTER)
    terminal.clear()
    terminal.type("endless" + ENTER)
    terminal.wait_for("one two three                │ one two three")
    terminal.type(CTRL_C)
    terminal.wait_for("stopped", "which goes on?")
    terminal.type("0" + ENTER)
    terminal.wait_for("neither goes on; the question is taken back")
    terminal.type("/compare off" + ENTER)
    terminal.wait_for("fake-1b answers alone")
    terminal.clear()
    terminal.type("and?" + ENTER)
    terminal.wait_for("user: slow", "user: and?")
    assert "endless" not in terminal.text
    terminal.type(CTRL_D)
    assert terminal.wait_for_end() == 0
    assert terminal.has_restored_settings()


def test_an_answer_goes_on_is_copied_and_a_second_ctrl_c_leaves(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("some notes")
    # no program here copies
    terminal = start(PATH=str(tmp_path), DISPLAY="", WAYLAND_DISPLAY="")
    terminal.type("endless" + ENTER)
    terminal.wait_for("one two three")
    terminal.type(CTRL_C)
    terminal.wait_for(STOPPED)
    terminal.type("/continue" + ENTER)
    terminal.wait_for("user: endless", "assistant: one two three")
    terminal.type("/copy" + ENTER)
    terminal.wait_for("error: there is no pbcopy, wl-copy, xclip or xsel")
    terminal.type("/set clipboard terminal" + ENTER)
    terminal.wait_for("clipboard is terminal")
    terminal.type("/copy" + ENTER)
    terminal.wait_for("copied the last answer")
    data = base64.b64encode(b"one two threeuser: endless\nassistant: one two three")
    assert b"\x1b]52;c;" + data + b"\x07" in terminal.raw
    terminal.clear()
    terminal.type(f"/attach {tmp_path}/notes.txt" + ENTER)
    terminal.wait_for("(10 bytes, 5 tokens) goes with")
    terminal.type("what is this?" + ENTER)
    terminal.wait_for("```txt", "some notes")
    terminal.type(CTRL_C)
    terminal.wait_for("Ctrl-C once more, Ctrl-D or /exit leaves")
    terminal.type(CTRL_C)
    assert terminal.wait_for_end() == 0
    assert terminal.has_restored_settings()
