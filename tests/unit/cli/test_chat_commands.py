"""Commands on the turns of a chat, as whole transcripts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from chatserve.cli import lines, pastes
from chatserve.cli.answer import ChatDelta
from chatserve.cli.asking import CONTEXT_LINE
from chatserve.cli.kept_chat import KeptChat
from chatserve.cli.session_store import Session as SavedSession
from chatserve.cli.session_store import SessionStore
from chatserve.cli.slash.table import RUNS
from chatserve.cli.transcript import Transcript, Turn
from chatserve.errors import ContextLengthExceeded, UnsupportedParameter
from tests.unit.cli.test_chat import (
    ADAPTED,
    CTRL_C,
    ScriptedLines,
    ScriptedServer,
    Session,
    contents,
)

GUIDE = Path(__file__).parents[3] / "docs" / "guide" / "chat.md"
CUT = ChatDelta("", "length", 4)


class Kept:
    """Keeps nothing but the names of chats that were begun."""

    def __init__(self) -> None:
        self.number = 1

    @property
    def name(self) -> str:
        return f"chat-{self.number}"

    def begin_anew(self) -> None:
        self.number += 1

    def keep(self, transcript: Transcript, model: str) -> None: ...
    def rename(self, name: str) -> str | None: ...
    def listed(self) -> str: ...
    def searched(self, words: str) -> str: ...
    def resume(self, wanted: str, source: str) -> Transcript: ...
    def delete(self, wanted: str) -> str: ...


def test_every_command_is_told_of_and_done() -> None:
    assert {entry.name for entry in lines.COMMANDS} == {*RUNS, "exit"}


def test_the_guide_has_a_row_for_every_command() -> None:
    rows = [row.split("|")[1] for row in GUIDE.read_text("utf-8").split("\n") if "| `/" in row]
    named = [row.strip().strip("`").split() for row in rows]
    expected = [
        " ".join(["/" + entry.name, entry.usage]).strip().split() for entry in lines.COMMANDS
    ]
    assert named == expected


def test_an_edited_question_is_asked_instead_of_the_last() -> None:
    session = Session(ScriptedServer(["1"], ["2"], ["2b"]))
    assert session.type("a", "b", "/edit", "/c is a path", "") == (
        "> a\n1\n> b\n2\n> /edit\n> /c is a path\n2b\n> \n> ^D\n"
    )
    assert session.lines.prefills == ["", "", "", "b", "", ""]
    assert contents(session.server.requests[2]) == ["a", "1", "/c is a path"]


def test_editing_an_earlier_question_leaves_the_chat_as_it_was_and_begins_another() -> None:
    session = Session(ScriptedServer(["1"], ["2"], ["1b"]), system="be brief")
    session.chat.kept = Kept()
    assert session.type("a", "b", "!!edit 1", "c") == (
        "> a\n1\n> b\n2\n> !!edit 1\n> c\nthe chat as it was is kept as chat-1\n1b\n> ^D\n"
    )
    assert contents(session.server.requests[2]) == ["be brief", "c"]
    assert session.chat.kept.name == "chat-2"


@pytest.mark.parametrize("typed", ["", "  ", CTRL_C])
def test_an_edit_that_is_given_up_changes_nothing(typed: Any) -> None:
    session = Session(ScriptedServer(["1"]))
    assert "nothing is changed" in session.type("a", "/edit", typed)
    assert [turn.content for turn in session.transcript.turns] == ["a", "1"]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["/edit"], "no question to edit"),
        (["/edit!"], "no question to edit"),
        (["a", "/edit 2"], "error: there is no question 2; /history numbers 1 to 1"),
        (["a", "/edit 0"], "error: there is no question 0"),
        (["a", "/edit x"], "error: there is no question x"),
        (["/continue"], "no answer to go on with"),
        (["/history"], "the conversation is empty"),
        (["/stats"], "no answer yet"),
    ],
)
def test_what_there_is_not_is_told(typed: list[str], told: str) -> None:
    assert f"\n{told}" in Session(ScriptedServer(["1"])).type(*typed)


def test_a_question_too_long_for_the_prompt_is_told_and_the_chat_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = ScriptedLines.read

    def folding(lines: ScriptedLines, prefill: str = "") -> str:
        pastes.Pastes().fold(prefill)  # as the line editor does
        return read(lines, prefill)

    monkeypatch.setattr(pastes, "MAX_PASTE_LEN", 3)
    monkeypatch.setattr(ScriptedLines, "read", folding)
    shown = Session(ScriptedServer(["1"], ["2"])).type("long", "/edit", "b")
    assert shown == (
        "> long\n1\n> /edit\nerror: the question has 4 characters, too many for the prompt; "
        "/edit! opens your own editor\n> b\n2\n> ^D\n"
    )


def editor(folder: Path, code: str) -> str:
    """The command line of an editor that runs `code` on `file`."""
    script = folder / "editor.py"
    script.write_text(f"import pathlib, sys\nfile = pathlib.Path(sys.argv[1])\n{code}\n")
    return f"'{sys.executable}' '{script}'"


def test_a_question_is_edited_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "text = file.read_text()\n"
        f"pathlib.Path({str(tmp_path / 'seen')!r}).write_text("
        "f'{file.stat().st_mode & 0o777:o} {file.parent.stat().st_mode & 0o777:o} {file} {text}')\n"
        "file.write_text(text.replace('one', '一') + 'more\\n\\n')"
    )
    monkeypatch.setenv("VISUAL", editor(tmp_path, code))
    session = Session(ScriptedServer(["1"], ["2"]))
    assert session.type('"""one\ntwo"""', "/edit!") == ('> """one\ntwo"""\n1\n> /edit!\n2\n> ^D\n')
    assert contents(session.server.requests[1]) == ["一\ntwo\nmore"]
    modes, folder, file, text = (tmp_path / "seen").read_text().split(" ", 3)
    assert (modes, folder, text) == ("600", "700", "one\ntwo\n")
    assert not Path(file).exists()


def test_a_typed_byte_that_is_no_character_goes_to_the_editor_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISUAL", editor(tmp_path, "file.write_text(file.read_text() + 'more')"))
    session = Session(ScriptedServer(["1"], ["2"]))
    session.type("caf\udce9", "/edit!")
    assert contents(session.server.requests[1]) == ["caf?\nmore"]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("/nowhere/editor", "error: cannot start the editor /nowhere/editor: No such file"),
        ("'open", 'error: cannot start the editor "\'open": No closing quotation'),
        ("sys.exit(3)", "ended with exit code 3"),
        ("file.unlink()", "cannot read what"),
        ("file.write_bytes(b'\\xff')", "cannot read what"),
        ("file.write_text('')", "nothing is changed"),
        ("pass", "nothing is changed"),
    ],
)
def test_an_editor_that_fails_or_does_nothing_changes_nothing(
    command: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_code = not command.startswith(("/", "'"))
    monkeypatch.setenv("VISUAL", editor(tmp_path, command) if is_code else command)
    session = Session(ScriptedServer(["1"]))
    assert told in session.type("a", "/edit!")
    assert [turn.content for turn in session.transcript.turns] == ["a", "1"]


def test_an_answer_that_was_stopped_goes_on_where_it_was() -> None:
    session = Session(ScriptedServer(["One, ", CTRL_C], ["two", ", three."], ["4"]))
    assert "> /continue\ntwo, three.\n" in session.type("count", "/continue", "more")
    first = session.server.sampling[1]
    assert first["continue_final_message"] is True and first["add_generation_prompt"] is False
    assert contents(session.server.requests[1]) == ["count", "One, "]
    assert contents(session.server.requests[2]) == ["count", "One, two, three.", "more"]
    assert "continue_final_message" not in session.server.sampling[2]
    assert [turn.is_partial for turn in session.transcript.turns] == [False] * 4


def test_an_answer_that_its_limit_cut_goes_on_piece_by_piece() -> None:
    session = Session(ScriptedServer(["a ", CUT], ["b ", CUT], ["c"]), sampling={"max_tokens": 4})
    assert session.type("q", "/continue", "/continue") == (
        "> q\na \nthe answer stopped at max_tokens 4; /continue goes on\n"
        "> /continue\nb \nthe answer stopped at max_tokens 4; /continue goes on\n"
        "> /continue\nc\n> ^D\n"
    )
    assert session.transcript.turns[1].content == "a b c"


def test_without_history_an_answer_goes_on_with_its_question_alone() -> None:
    session = Session(ScriptedServer(["1"], ["a ", CUT], ["b"]), with_history=False)
    session.type("one", "two", "/continue")
    assert contents(session.server.requests[2]) == ["two", "a "]


def test_a_server_that_cannot_go_on_says_so_and_nothing_is_lost() -> None:
    refusal = UnsupportedParameter("no continue_final_message here", param="continue_final_message")
    session = Session(ScriptedServer(["half", CTRL_C], [refusal], [CTRL_C]))
    screen = session.type("q", "/continue", "/continue")
    assert "> /continue\nerror: no continue_final_message here\n" in screen
    assert [turn.content for turn in session.transcript.turns] == ["q", "half"]
    assert session.transcript.turns[1].is_partial


def test_nothing_goes_on_before_the_first_word() -> None:
    session = Session(ScriptedServer([CTRL_C]))
    assert "nothing of the answer has come; /regen asks again" in session.type("q", "/continue")


def test_a_second_ctrl_c_leaves() -> None:
    session = Session(ScriptedServer(["half", CTRL_C], ["never"]))
    assert session.type("q", CTRL_C, "never typed").endswith("Ctrl-C leaves\n> ^C\n")
    session = Session(ScriptedServer(["1"]))
    assert session.type(CTRL_C, "q", CTRL_C, CTRL_C, "never typed") == (
        "> ^C\nCtrl-C once more, Ctrl-D or /exit leaves\n"
        "> q\n1\n"
        "> ^C\nCtrl-C once more, Ctrl-D or /exit leaves\n"
        "> ^C\n"
    )


def dropping(text: str, *places: int) -> list[Any]:
    return [ChatDelta(messages_dropped=places), text]


def test_turns_that_leave_the_context_are_told_and_a_line_is_drawn() -> None:
    server = ScriptedServer(
        ["1"], ["2"], dropping("3", 1, 2), dropping("4", 1, 2), dropping("5", 1, 2, 3, 4)
    )
    session = Session(server, system="be brief")
    moved = "no longer in the context of 2,048 tokens; /history draws the line\n"
    assert session.type("a", "b", "/set context rolling", "c", "d", "e", "/history") == (
        "> a\n1\n> b\n2\n"
        "> /set context rolling\ncontext is rolling\n"
        f"> c\n3\nthe oldest 2 turns are {moved}"
        "> d\n4\n"
        f"> e\n5\nthe oldest 4 turns are {moved}"
        f"> /history\n[1] USER: a\nASSISTANT: 1\n[2] USER: b\nASSISTANT: 2\n{CONTEXT_LINE}\n"
        "[3] USER: c\nASSISTANT: 3\n[4] USER: d\nASSISTANT: 4\n[5] USER: e\nASSISTANT: 5\n"
        "> ^D\n"
    )
    assert session.server.sampling[0].get("truncation") is None
    assert session.server.sampling[2]["truncation"] == "rolling"


def test_the_line_is_where_a_stopped_answer_left_it_and_goes_with_the_chat() -> None:
    server = ScriptedServer(["1"], [*dropping("half", 0, 1), CTRL_C], [ContextLengthExceeded("no")])
    session = Session(server)
    assert "the oldest 2 turns are" in session.type("a", "b")
    assert CONTEXT_LINE in session.type("/history", "c", "/history")
    assert session.chat.num_outside == 2
    session.type("/clear")
    assert session.chat.num_outside == 0


def test_places_that_no_message_has_draw_no_line() -> None:
    session = Session(ScriptedServer(dropping("1", 7, 10_000)), system="be brief")
    assert session.type("a") == "> a\n1\n> ^D\n"


def test_without_history_all_that_was_said_is_out_of_context() -> None:
    session = Session(ScriptedServer(["1"]), with_history=False)
    assert session.type("a", "/history").endswith(
        f"[1] USER: a\nASSISTANT: 1\n{CONTEXT_LINE}\n> ^D\n"
    )


def test_a_chat_that_is_too_long_can_be_let_roll() -> None:
    server = ScriptedServer(
        [ContextLengthExceeded("too long")], ["ok"], [ContextLengthExceeded("no")]
    )
    session = Session(server)
    screen = session.type("a", "/set context rolling", "/regen", "b")
    assert "`/set context rolling` and /regen let the oldest turns go, /clear starts over" in screen
    assert screen.endswith("error: no\n/clear starts over\n> ^D\n")
    assert contents(server.requests[1]) == ["a"]


def test_stats_of_the_last_answer_and_of_all() -> None:
    usage = {"num_prompt_tokens": 1000, "num_cached_tokens": 900}
    first = ["a", "b", ChatDelta("", "stop", 3, num_prompt_tokens=20)]
    second = ["a", "b", "c", ChatDelta("", "stop", 5, **usage)]
    session = Session(ScriptedServer(first, second))
    screen = session.type("q", "r", "/stats")
    assert screen.split("/stats\n")[1] == (
        "last answer  fake-1b · 1,000 tokens in (900 cached) · 5 out · first after 0.50 s · "
        "4.0 tokens/s\n"
        "in all       2 answers · 1,020 tokens in (900 cached) · 8 out · 2.5 s\n"
        "context      1,005 of 2,048 tokens (49%)\n"
        "> ^D\n"
    )


def test_stats_of_a_server_that_tells_nothing() -> None:
    session = Session(ScriptedServer(["a"]))
    session.server.chosen = ADAPTED
    screen = session.type("q", "/stats")
    counted = "about 1 out (counted here)"
    assert f"last answer  fake-1b:sql · {counted} · first after 0.50 s · 0.5 s\n" in screen
    assert "context      the server does not say how much is used\n" in screen


def test_stats_of_a_stopped_answer_say_who_counted() -> None:
    told = ["a", ChatDelta("", "stop", 3, num_prompt_tokens=20)]
    session = Session(ScriptedServer(told, ["a", "b", "c", CTRL_C]))
    screen = session.type("q", "r", "/stats")
    assert screen.split("/stats\n")[1] == (
        "last answer  fake-1b · about 3 out (counted here) · first after 0.50 s · "
        "about 2.0 tokens/s · 1.5 s\n"
        "in all       2 answers · 20 tokens in · 3 out · about 3 out (counted here) · 2.0 s\n"
        "context      the server does not say how much is used\n"
        "> ^D\n"
    )


def test_a_program_has_no_commands_that_need_a_person() -> None:
    session = Session(ScriptedServer(["1"]), is_typed=False)
    screen = session.type("a", "!!edit", "!!edit!", "!!compare x")
    assert screen.count("needs a terminal") == 3


def kept_session(path: Path, *answers: list[Any]) -> Session:
    session = Session(ScriptedServer(*answers), columns=200)
    store = SessionStore(path)
    for name, texts in {"trip": ("Where to?", "Madeira."), "code": ("Sort", "sorted()")}.items():
        other = SavedSession()
        turns = [Turn("user", texts[0]), Turn("assistant", texts[1])]
        store.save(other, Transcript(turns=turns), "m")
        store.rename(other, name)
    session.chat.kept = KeptChat(SessionStore(path), session.chat.display.note)
    return session


def test_kept_chats_are_searched_resumed_and_deleted_from_within(tmp_path: Path) -> None:
    session = kept_session(tmp_path / "chats" / "chats.db", ["first"], ["more"], ["again"])
    screen = session.type(
        "a", "/name mine", "/sessions search MADEIRA", "/sessions resume trip", "and?",
        "/sessions delete trip", "/sessions delete code", "/sessions", "/sessions resume mine", "c",
    )  # fmt: skip
    assert (
        "    assistant: Madeira.\n> /sessions resume trip\nUSER: Where to?\nASSISTANT: Madeira.\n"
        in screen
    )
    assert contents(session.server.requests[1]) == ["Where to?", "Madeira.", "and?"]
    assert "error: this chat goes on; /clear begins another, then it can be deleted\n" in screen
    assert "> /sessions delete code\ndeleted code\n" in screen
    listed = screen.split("> /sessions\n")[1].split("> ")[0]
    assert [row.split()[0] for row in listed.splitlines()] == ["trip", "mine"]
    assert contents(session.server.requests[2]) == ["a", "first", "c"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/sessions list", "trip  "),
        (
            "/sessions find x",
            "error: /sessions knows no 'find'; it knows list, search, resume, delete",
        ),
        ("/sessions search", "error: /sessions search needs TEXT"),
        ("/sessions delete ", "error: /sessions delete needs CHAT"),
        ("/sessions search nowhere", "nothing is found"),
        ("/sessions resume none", "error: /sessions resume none: no chat has this name or id; the"),
        ("/sessions delete none", "error: /sessions delete none: no chat has this name or id; the"),
    ],
)
def test_deeds_of_sessions_are_named(line: str, told: str, tmp_path: Path) -> None:
    session = kept_session(tmp_path / "chats" / "chats.db", ["1"])
    assert f"\n{told}" in session.type(line)
    assert "no chat is kept (--no-save)" in Session(ScriptedServer()).type(line)
