"""`/compare`: two models answer at once; what is drawn, what is chosen, what goes wrong."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Mapping
from typing import Any

import pyte
import pytest

from chatserve.cli.answer import ChatDelta, Progress
from chatserve.cli.columns import MIN_COLUMNS, Columns
from chatserve.cli.columns_drawer import ColumnsDrawer
from chatserve.cli.contest import Contest
from chatserve.errors import NoWorkerAvailable, StartupError
from tests.unit.cli.test_chat import (
    CTRL_C,
    ScriptedRival,
    ScriptedServer,
    Session,
    contents,
)

WIDE, NARROW = 100, MIN_COLUMNS - 1
ON = "/compare fake-1b:sql"
CHOOSE = "which goes on? 1 or 2, 0 neither (Enter: 1)\n"


def rivals(first: ScriptedRival, second: ScriptedRival, *answers: list[Any]) -> ScriptedServer:
    server = ScriptedServer(*answers)
    server.rivals = {"fake-1b": first, "fake-1b:sql": second}
    return server


def screen_of(text: str, columns: int = WIDE, rows: int = 24) -> list[str]:
    """What a terminal shows, with what has left it at its top."""
    screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=1)
    pyte.Stream(screen).feed(text.replace("\r\n", "\n").replace("\n", "\r\n"))
    above = ["".join(line[column].data for column in range(columns)) for line in screen.history.top]
    return [line.rstrip() for line in (*above, *screen.display)]


def test_two_models_answer_and_the_chosen_answer_goes_on() -> None:
    first = ScriptedRival(["left ", "one"], ["again"])
    second = ScriptedRival(["right", ChatDelta("", "stop", 2, num_prompt_tokens=9)], ["b"])
    session = Session(rivals(first, second, ["alone"]), columns=WIDE)
    screen = session.type(ON, "q", "2", "more", "", "/compare", "/compare off", "third")
    assert (
        f"> {ON}\nfake-1b and fake-1b:sql answer, and you choose; /compare off ends that\n"
        in screen
    )
    shown = screen_of(screen)
    assert "fake-1b".ljust(48) + " │ fake-1b:sql" in shown
    assert "left one".ljust(48) + " │ right" in shown
    assert CHOOSE in screen
    assert "2 fake-1b:sql · 9 tokens in · 2 out" in screen
    assert contents(second.requests[1]) == contents(first.requests[1]) == ["q", "right", "more"]
    assert contents(session.server.requests[0]) == ["q", "right", "more", "again", "third"]
    assert screen.endswith(
        "fake-1b answers alone; /compare MODEL adds another\n> third\nalone\n> ^D\n"
    )
    assert first.is_closed and second.is_closed
    assert session.chat.stats.num_answers == 5


def test_what_an_answer_waits_for_is_told_until_it_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits = [
        ChatDelta(place=2), ChatDelta(loading=Progress("sql\x1b[2J", "loading", 1, 4)),
        ChatDelta(note="asking\x1b[2J again"), ChatDelta(reasoning="Hm"),
        ChatDelta(reasoning="m. "), "So: ", ChatDelta(reasoning="Hm."), "right",
    ]  # fmt: skip
    drawn: list[tuple[int, str]] = []
    monkeypatch.setattr(ColumnsDrawer, "wait", lambda _, index, text: drawn.append((index, text)))
    session = Session(rivals(ScriptedRival(["left"]), ScriptedRival(waits)), columns=WIDE)
    session.type(ON, "q", "2")
    assert [text for _, text in drawn] == [
        "2nd in the queue", "loading sql █████░░░░░░░░░░░░░░░ 25% 0 / 0 MB", "asking again",
        "thinking … 2 characters", "thinking … 5 characters",
    ]  # fmt: skip
    assert {index for index, _ in drawn} == {1}
    assert session.transcript.turns[-1].content == "So: right"


def test_what_a_column_waits_for_goes_when_its_answer_begins_or_ends() -> None:
    columns = Columns(["a", "b"])
    columns.wait(0, "thinking … 12 characters, and this is wider than a column")
    columns.wait(1, "next in the queue")
    out = columns.frame(80, 24) + drawn(columns, 80, (1, "yes"))
    assert columns.frame(80, 24) == ""
    before = screen_of(out, 80)
    assert before[2] == "thinking … 12 characters, and this is  │ yes"
    columns.wait(1, "too late")
    columns.end(0)
    out += columns.frame(80, 24)
    columns.end(1)
    out += columns.frame(80, 24)
    assert "\n".join(screen_of(out, 80)).rstrip().split("\n")[2:] == [" " * 38 + " │ yes"]


def test_on_a_narrow_terminal_one_comes_after_the_other() -> None:
    session = Session(rivals(ScriptedRival(["left"]), ScriptedRival(["right\n"])), columns=NARROW)
    screen = session.type(ON, "q", "1")
    assert "── fake-1b ──\nleft\n\n── fake-1b:sql ──\nright\n" in screen
    assert "\x1b" not in screen


def test_neither_may_go_on() -> None:
    session = Session(rivals(ScriptedRival(["a"]), ScriptedRival(["b"])), columns=WIDE)
    screen = session.type(ON, "q", "3", "no", "0")
    assert screen.count("error: 1, 2 or 0; Enter takes 1\n") == 2
    assert screen.endswith("> 0\nneither goes on; the question is taken back\n> ^D\n")
    assert session.transcript.turns == []


@pytest.mark.parametrize("typed", [[CTRL_C], []])
def test_ctrl_c_takes_the_first_and_so_does_the_end(typed: list[Any]) -> None:
    session = Session(rivals(ScriptedRival(["a"]), ScriptedRival(["b"])), columns=WIDE)
    session.type(ON, "q", *typed)
    assert [turn.content for turn in session.transcript.turns] == ["q", "a"]


@pytest.mark.parametrize("end", [SystemExit(143), StartupError("the server is gone")])
def test_a_chat_that_ends_before_the_choice_keeps_the_first_answer(end: BaseException) -> None:
    session = Session(rivals(ScriptedRival(["a"]), ScriptedRival(["b"])), columns=WIDE)
    with pytest.raises(type(end)):
        session.type(ON, "q", end)
    assert [turn.content for turn in session.transcript.turns] == ["q", "a"]


def test_one_that_fails_is_told_and_the_other_goes_on_unasked() -> None:
    first = ScriptedRival([NoWorkerAvailable("gone\x1b[2J")])
    session = Session(rivals(first, ScriptedRival(["b"])), columns=WIDE)
    screen = session.type(ON, "q")
    assert "error: fake-1b: gone\n" in screen and CHOOSE not in screen
    assert [turn.content for turn in session.transcript.turns] == ["q", "b"]


def test_both_that_fail_leave_the_question_for_regen() -> None:
    gone = NoWorkerAvailable("gone")
    first, second = ScriptedRival([gone], ["a"]), ScriptedRival([gone], ["b"])
    session = Session(rivals(first, second), columns=WIDE)
    screen = session.type(ON, "q", "/regen", "2")
    assert screen.count("gone\n") == 2
    assert [turn.content for turn in session.transcript.turns] == ["q", "b"]


def test_ctrl_c_keeps_what_has_come_and_ends_both_on_the_server() -> None:
    first, second = ScriptedRival(["left"], waits=True), ScriptedRival(["ri", "ght"], waits=True)
    session = Session(rivals(first, second), columns=WIDE)
    num_shown = 0

    def interrupt(_: float) -> None:
        nonlocal num_shown
        num_shown += 1
        if "left" in session.screen.getvalue() and "right" in session.screen.getvalue():
            signal.raise_signal(signal.SIGINT)

    assert session.chat.display._columns_drawer is not None
    session.chat.display._columns_drawer._sleep = interrupt
    screen = session.type(ON, "q", "2")
    assert "stopped\n" in screen and CHOOSE in screen
    (question, answer) = session.transcript.turns
    assert (question.content, answer.content, answer.is_partial) == ("q", "right", True)
    assert first.is_closed and second.is_closed
    assert [each.name for each in threading.enumerate() if each.name == "rival"] == []


def test_the_chosen_answer_says_what_cut_it_and_what_had_no_room() -> None:
    first = ScriptedRival(
        ["1"], [ChatDelta(messages_dropped=(1, 2)), "cut", ChatDelta("", "length", 4)]
    )
    session = Session(
        rivals(first, ScriptedRival(["1"], ["b"])), columns=WIDE, system="be brief",
        sampling={"max_tokens": 4},
    )  # fmt: skip
    screen = session.type(ON, "q", "1", "r", "1")
    assert screen.endswith(
        "> 1\nthe oldest 2 turns are no longer in the context of 2,048 tokens; "
        "/history draws the line\n"
        "the answer stopped at max_tokens 4; /continue goes on\n> ^D\n"
    )
    assert session.chat.num_outside == 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/compare none", "error: none is not served; there is fake-1b, fake-1b:sql"),
        ("/compare a b c", "error: /compare takes one or two models"),
        ("/compare", "fake-1b answers alone; /compare MODEL adds another"),
        ("/compare off", "fake-1b answers alone; /compare MODEL adds another"),
    ],
)
def test_what_cannot_be_compared_is_told(line: str, told: str) -> None:
    session = Session(ScriptedServer(["1"]), columns=WIDE)
    assert f"\n{told}\n" in session.type(line, "q")
    assert [turn.content for turn in session.transcript.turns] == ["q", "1"]


def test_the_same_model_may_answer_twice() -> None:
    twin = ScriptedRival(["one"], ["two"])
    session = Session(rivals(twin, twin), columns=WIDE)
    session.type("/compare fake-1b fake-1b", "q", "1")
    assert len(twin.requests) == 2


def test_a_bug_in_a_thread_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)

    class Broken(ScriptedRival):
        def stream(
            self, messages: list[dict[str, str]], sampling: Mapping[str, Any]
        ) -> Generator[ChatDelta, None, None]:
            raise RuntimeError("a bug")

    contest = Contest([Broken()], lambda _, rival: rival.stream([], {}))
    with contest.batches() as batches:
        assert [len(batch) for batch in batches] == [1]
    assert str(seen[0].exc_value) == "a bug"


def drawn(columns: Columns, width: int, *pieces: tuple[int, str], rows: int = 24) -> str:
    out = ""
    for index, text in pieces:
        columns.feed(index, text)
        out += columns.frame(width, rows)
    return out


def test_columns_wrap_words_and_wide_characters() -> None:
    columns = Columns(["a", "b"])
    out = drawn(
        columns,
        21,
        (0, "one two thr"),
        (1, "你好世界你"),
        (0, "ee\n"),
        (1, "x"),
        (0, "longestword"),
    )
    for index in (0, 1):
        columns.end(index)
    out += columns.frame(21, 24)
    assert [line for line in screen_of(out, 21) if line] == [
        "a        │ b",
        "─        │ ─",
        "one two  │ 你好世界",
        "three    │ 你x",
        "longestw │",
        "ord      │",
    ]


@pytest.mark.parametrize("lead", [0, 1])
def test_a_column_far_ahead_of_the_other_loses_nothing(lead: int) -> None:
    columns, numbers = Columns(["a", "b"]), [f"{number:04}" for number in range(200)]
    out = drawn(columns, 60, *((lead, f"{number}\n") for number in numbers), rows=10)
    out += drawn(columns, 60, *((1 - lead, f"x{number}\n") for number in numbers), rows=10)
    columns.end(0)
    columns.end(1)
    out += columns.frame(60, 10)
    lines = [line for line in screen_of(out, 60, 10) if line]
    ours, theirs = ("", "x") if lead == 0 else ("x", "")
    expected = [f"{ours}{number}".ljust(28) + f" │ {theirs}{number}" for number in numbers]
    positions = [lines.index(row) for row in expected]
    assert positions == sorted(positions)
    assert lines[-1] == expected[-1]


def test_a_change_of_width_loses_nothing() -> None:
    columns = Columns(["a", "b"])
    out = drawn(columns, 80, (0, "word " * 12 + "\n"), (1, "right"))
    out += drawn(columns, 61, (0, "end"))
    columns.end(0)
    columns.end(1)
    out += columns.frame(61, 24)
    last = screen_of(out, 80)
    words = " ".join(line.partition(" │")[0] for line in last).split()
    assert words[-13:] == ["word"] * 12 + ["end"]


def test_drawing_a_long_answer_stays_linear() -> None:
    columns = Columns(["a", "b"])
    longest = 0
    for number in range(3000):
        columns.feed(0, f"word{number} ")
        columns.feed(1, f"other{number} ")
        longest = max(longest, len(columns.frame(100, 24)))
    assert longest < 3000
