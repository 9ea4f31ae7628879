"""Keys in, lines out: the editor on a pipe instead of a keyboard."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session, get_app
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import History, InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from chatserve.cli.completion import ChatCompleter, FreshNames
from chatserve.cli.line_editor import LineEditor
from chatserve.cli.pastes import MAX_PASTE_LEN, Pastes
from chatserve.cli.theme import theme_of
from chatserve.errors import ModelLoadError, UsageError

CTRL_C, CTRL_D, ENTER, ESC, UP = "\x03", "\x04", "\r", "\x1b", "\x1b[A"
BACKSPACE, CTRL_R, CTRL_X, CTRL_E, RIGHT = "\x7f", "\x12", "\x18", "\x05", "\x1b[C"


def paste(text: str) -> str:
    """As a terminal sends it."""
    return ESC + "[200~" + text + ESC + "[201~"


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        yield keyboard


def editor(
    keyboard: PipeInput,
    *,
    status: Callable[[int], str] = lambda columns: "",
    is_multiline: bool = False,
    history: History | None = None,
) -> LineEditor:
    return LineEditor(
        status, history or InMemoryHistory(), ChatCompleter(), theme_of("auto", None).editor,
        is_multiline=is_multiline, source=keyboard, screen=DummyOutput(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("hello" + ENTER, "hello"),
        ("你好" + ENTER, "你好"),
        ("two" + ESC + ENTER + "lines" + ENTER, "two\nlines"),
        ('"""one' + ENTER + "two" + ENTER + '"""' + ENTER, '"""one\ntwo\n"""'),
        (paste("pasted\nlines") + ENTER, "pasted\nlines"),
        ("wrong" + CTRL_C + "right" + ENTER, "right"),
        ("/reg\t" + ENTER, "/regen"),
        ("/re\tg\t" + ENTER, "/regen"),
        (paste("two\r\nlines\rmore") + ENTER, "two\nlines\nmore"),
        ("see: " + paste("line\n" * 500) + "?" + ENTER, "see: " + "line\n" * 500 + "?"),
        (paste("a" * 5000) + BACKSPACE + "b" + ENTER, "b"),
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

    def status(columns: int) -> str:
        try:
            return next(looks)
        except StopIteration:
            raise ModelLoadError("no such folder") from None

    with pytest.raises(ModelLoadError, match="no such folder"):
        editor(keyboard, status=status).read()


def test_arrows_look_for_lines_that_begin_alike(keyboard: PipeInput) -> None:
    lines = editor(keyboard)
    for line in ("what is this", "hello", "what is that", "bye"):
        keyboard.send_text(line + ENTER)
        lines.read()
    keyboard.send_text("wh" + UP + UP + ENTER)
    assert lines.read() == "what is this"
    keyboard.send_text(CTRL_R + "ell" + ENTER + ENTER)
    assert lines.read() == "hello"


def test_a_long_paste_is_one_line_of_history_and_a_huge_one_is_not_kept(
    keyboard: PipeInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatserve.cli.line_editor.MAX_KEPT_LEN", 3000)
    history = InMemoryHistory()
    lines = editor(keyboard, history=history)
    keyboard.send_text(paste("line\n" * 50) + ENTER)
    assert lines.read() == "line\n" * 50
    keyboard.send_text(paste("x" * 3001) + ENTER)
    lines.read()
    assert list(history.load_history_strings()) == ["line\n" * 50]
    later = editor(keyboard, history=history)
    keyboard.send_text(UP + "!" + ENTER)
    assert later.read() == "line\n" * 50 + "!"


def test_a_paste_is_shown_as_what_it_is() -> None:
    pastes = Pastes()
    assert pastes.fold("short\ntext") == "short\ntext"
    many = pastes.fold("line\n" * 12_345)
    wide = pastes.fold("x" * 5000)
    assert [len(many), pastes.label(many)] == [1, "[pasted 12,345 lines]"]
    assert [len(wide), pastes.label(wide)] == [1, "[pasted 5,000 characters]"]
    assert pastes.label("x") is None
    assert pastes.unfold(f"a{many}b{wide}") == "a" + "line\n" * 12_345 + "b" + "x" * 5000


def test_a_character_that_stands_for_a_paste_cannot_be_pasted() -> None:
    pastes = Pastes()
    secret = pastes.fold("x" * 5000)
    assert pastes.unfold(pastes.fold(f"a{secret}b")) == "ab"


def test_a_paste_that_is_too_long_is_refused_by_its_size() -> None:
    with pytest.raises(UsageError, match=r"8,388,609 characters .* 8,388,608; /attach"):
        Pastes().fold("x" * (MAX_PASTE_LEN + 1))


def test_a_refused_paste_is_told_below_the_prompt(
    keyboard: PipeInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatserve.cli.pastes.MAX_PASTE_LEN", 10)
    lines = editor(keyboard)
    keyboard.send_text(paste("much too long") + ENTER)
    assert lines.read() == ""
    assert lines.below == "13 characters are pasted, the limit is 10; /attach takes files"


def test_the_users_editor_gets_the_whole_line(
    keyboard: PipeInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISUAL", "sed -i -e s/line/word/ -e 2q")

    def status(columns: int) -> str:
        if get_app().current_buffer.text.startswith("word"):
            keyboard.send_text(ENTER)
        return ""

    keyboard.send_text(paste("line\n" * 20) + CTRL_X + CTRL_E)
    assert editor(keyboard, status=status).read() == "word\nword"


def test_an_editor_that_is_missing_is_told(
    keyboard: PipeInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISUAL", "no-such-editor")

    def status(columns: int) -> str:
        if lines.below:
            keyboard.send_text(ENTER)
        return ""

    lines = editor(keyboard, status=status)
    keyboard.send_text("text" + CTRL_X + CTRL_E)
    assert lines.read() == "text"
    assert "cannot start the editor no-such-editor" in lines.below


def test_a_suggestion_from_former_lines_is_taken_by_an_arrow(keyboard: PipeInput) -> None:
    lines = editor(keyboard)
    keyboard.send_text("what is the answer" + ENTER)
    lines.read()

    def status(columns: int) -> str:
        if suggestion := get_app().current_buffer.suggestion:
            keyboard.send_text(RIGHT + ENTER)
            return suggestion.text
        return ""

    more = editor(keyboard, status=status, history=lines.history)
    keyboard.send_text("what")
    assert more.read() == "what is the answer"


def completions(
    text: str, models: Sequence[str] = ("llama", "vicuna"), sessions: Sequence[str] = ("monday",)
) -> list[str]:
    completer = ChatCompleter(lambda: models, lambda: sessions)
    return [c.text for c in completer.get_completions(Document(text), CompleteEvent())]


def test_commands_and_files_are_completed(tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text("")
    assert completions("/re") == ["/regen", "/remove", "/reset"]
    assert completions("!!reg") == ["!!regen"]
    assert completions("/cl") == ["/clear"]
    assert "/clear" not in completions("/")
    assert completions("") == []
    assert completions("hello /re") == []
    assert completions("/re\ng") == []
    assert completions(f"/load {tmp_path}/ta") == ["lk.json"]
    assert completions(f"!!load {tmp_path}/ta") == ["lk.json"]
    assert completions(f"/attach {tmp_path}/x {tmp_path}/ta") == ["lk.json"]
    assert completions(f"/system {tmp_path}/ta") == []


@pytest.mark.parametrize(
    ("text", "completed"),
    [
        ("/model ", ["llama", "vicuna"]),
        ("/model v", ["vicuna"]),
        ("/model vicuna ", []),
        ("/compare ", ["llama", "vicuna", "off"]),
        ("/compare llama v", ["vicuna"]),
        ("/compare llama vicuna ", []),
        ("/set top", ["top_p", "top_k"]),
        ("/set context ", ["refuse", "rolling", "default"]),
        ("/set top_p ", ["default"]),
        ("/sessions re", ["resume"]),
        ("/sessions resume m", ["monday"]),
        ("/sessions delete ", ["monday"]),
        ("/sessions search ", []),
        ("/copy ", ["code"]),
        ("/regen ", []),
    ],
)
def test_what_commands_take_is_completed(text: str, completed: list[str]) -> None:
    assert completions(text) == completed


def test_commands_are_completed_with_their_help() -> None:
    (found,) = ChatCompleter().get_completions(Document("/regen"), CompleteEvent())
    assert found.display_meta_text == "ask the last question again"
    found, *_ = ChatCompleter().get_completions(Document("/set temp"), CompleteEvent())
    assert found.display_meta_text == "0 is greedy"


def test_names_that_are_slow_to_come_stop_nobody() -> None:
    may_answer, asked = threading.Event(), []

    def ask() -> list[str]:
        asked.append(1)
        may_answer.wait()
        return ["slow", "bad\x1b[2J"]

    names = FreshNames(ask)
    assert names() == ()
    may_answer.set()
    while not names():
        pass
    assert (names(), len(asked)) == (["slow"], 1)
