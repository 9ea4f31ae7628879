"""Keys in, lines out: the editor on a pipe instead of a keyboard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from chatserve.cli.line_editor import LineEditor, _CommandCompleter
from chatserve.cli.lines import spellings
from chatserve.errors import ModelLoadError

CTRL_C, CTRL_D, ENTER, ESC, UP = "\x03", "\x04", "\r", "\x1b", "\x1b[A"


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        yield keyboard


def editor(
    keyboard: PipeInput, *, status: Callable[[], str] = lambda: "", is_multiline: bool = False
) -> LineEditor:
    return LineEditor(
        status, InMemoryHistory(), spellings(), is_multiline=is_multiline, source=keyboard,
        screen=DummyOutput(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("hello" + ENTER, "hello"),
        ("你好" + ENTER, "你好"),
        ("two" + ESC + ENTER + "lines" + ENTER, "two\nlines"),
        ('"""one' + ENTER + "two" + ENTER + '"""' + ENTER, '"""one\ntwo\n"""'),
        (ESC + "[200~pasted\nlines" + ESC + "[201~" + ENTER, "pasted\nlines"),
        ("wrong" + CTRL_C + "right" + ENTER, "right"),
        ("/reg\t" + ENTER, "/regen"),
    ],
)
def test_keys_make_a_line(keys: str, line: str, keyboard: PipeInput) -> None:
    keyboard.send_text(keys)
    assert editor(keyboard).read() == line


def test_with_multiline_enter_adds_a_line_and_esc_enter_sends(keyboard: PipeInput) -> None:
    keyboard.send_text("one" + ENTER + "two" + ESC + ENTER)
    assert editor(keyboard, is_multiline=True).read() == "one\ntwo"


def test_ctrl_d_leaves_and_ctrl_c_on_an_empty_line_is_reported(keyboard: PipeInput) -> None:
    lines = editor(keyboard)
    keyboard.send_text(CTRL_C)
    with pytest.raises(KeyboardInterrupt):
        lines.read()
    keyboard.send_text(CTRL_D)
    with pytest.raises(EOFError):
        lines.read()


def test_earlier_lines_come_back(keyboard: PipeInput) -> None:
    lines = editor(keyboard)
    keyboard.send_text("first" + ENTER)
    lines.read()
    keyboard.send_text(UP + ENTER)
    assert lines.read() == "first"


def test_a_line_that_was_put_aside_comes_back(keyboard: PipeInput) -> None:
    keyboard.send_text("half a line" + CTRL_C + "other" + ENTER)
    lines = editor(keyboard)
    assert lines.read() == "other"
    keyboard.send_text(UP + UP + ENTER)
    assert lines.read() == "half a line"


def test_the_end_of_the_server_ends_the_prompt(keyboard: PipeInput) -> None:
    looks = iter(["loading", "loading"])

    def status() -> str:
        try:
            return next(looks)
        except StopIteration:
            raise ModelLoadError("no such folder") from None

    with pytest.raises(ModelLoadError, match="no such folder"):
        editor(keyboard, status=status).read()


def completions(text: str) -> list[str]:
    completer = _CommandCompleter(spellings())
    from prompt_toolkit.completion import CompleteEvent

    return [c.text for c in completer.get_completions(Document(text), CompleteEvent())]


def test_commands_and_files_are_completed(tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text("")
    assert completions("/re") == ["/regen", "/remove", "/reset"]
    assert completions("") == []
    assert completions("hello /re") == []
    assert completions(f"/load {tmp_path}/ta") == ["lk.json"]
    assert completions(f"!!load {tmp_path}/ta") == ["lk.json"]
    assert completions(f"/system {tmp_path}/ta") == []
