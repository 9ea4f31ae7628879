"""Whatever others wrote is drawn as text, wherever it comes from: no byte of it is obeyed."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable

import pytest

from chatserve.cli import render, status_bar
from chatserve.cli.answer import Answer, ModelInfo, Progress
from chatserve.cli.asking import ChatOptions, length_text
from chatserve.cli.chat import Chat
from chatserve.cli.columns import MIN_COLUMNS
from chatserve.cli.columns_drawer import ColumnsDrawer
from chatserve.cli.kept_chat import row
from chatserve.cli.render import Display, MarkdownPrinter, PlainDrawer
from chatserve.cli.session_store import SessionInfo
from chatserve.cli.slash import sessions, settings
from chatserve.cli.status_bar import status_text
from chatserve.cli.transcript import Transcript, Turn
from chatserve.errors import BadStream, NoWorkerAvailable
from tests.unit.cli.test_chat import ScriptedServer, Session
from tests.unit.cli.test_escapes import BIDI, PAYLOADS

CONTROLS = re.compile(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f{''.join(BIDI)}]")
COLOR = re.compile(r"\x1b\[[0-9;]*m")

Show = Callable[[str], str]


def on_display(show: Callable[[Display, str], object]) -> Show:
    def shown(text: str) -> str:
        screen = io.StringIO()
        show(Display(PlainDrawer(screen), screen), text)
        return screen.getvalue()

    return shown


def answered(display: Display, text: str) -> None:
    with display.answer() as draw:
        for char in text:
            draw(char)


def beside_another(text: str) -> str:
    screen = io.StringIO()
    drawer = ColumnsDrawer(screen, lambda: (MIN_COLUMNS - 1, 24), sleep=lambda _: None)
    with Display(PlainDrawer(screen), screen, columns_drawer=drawer).answers(["a", "b"]) as drawn:
        for char in text:
            drawn.draw(1, char)
    return screen.getvalue()


def resumed(text: str) -> str:
    screen = io.StringIO()
    display = Display(PlainDrawer(screen), screen)
    transcript = Transcript(turns=[Turn("user", text), Turn("assistant", text)], roles=(text, "B"))
    Chat(ScriptedServer(), display, transcript, ChatOptions()).show_turns(4)
    return screen.getvalue()


def listed(text: str) -> str:
    server = ScriptedServer()
    server.listed, server.chosen = [ModelInfo(text), ModelInfo("b")], ModelInfo(text)
    return Session(server).type("/model", "/model none", "/model b")


def refused(text: str) -> str:
    server = ScriptedServer([NoWorkerAvailable(text)], ["half", BadStream(text)])
    server.listed = NoWorkerAvailable(text)
    return Session(server).type("q", "q", "/model")


def noted(display: Display, text: str) -> None:
    display.note(row(SessionInfo(text, text, text, time.time(), 2)))
    display.note(text)


PLACES: dict[str, Show] = {
    "an answer": on_display(answered),
    "an error": on_display(Display.error),
    "a note, a list of chats": on_display(noted),
    "a loaded turn": on_display(lambda display, text: display.turn(text, text)),
    "an answer beside another": beside_another,
    "a resumed chat": resumed,
    "names of models": listed,
    "errors of servers": refused,
    "the status line": lambda text: status_text(ModelInfo(text, text, text), Answer()),
    "the end of an answer": lambda text: length_text(Answer(), ChatOptions(), ModelInfo(text)),
    "progress": lambda text: render.progress_text(Progress(text, text, 1, 2)),
}


def obeyed(show: Show) -> list[str]:
    """The payloads of which a terminal would get more than text."""
    return [each for each in PAYLOADS if CONTROLS.search(show(f"one{each} two"))]


@pytest.mark.parametrize("show", PLACES.values(), ids=PLACES)
def test_no_payload_is_obeyed(show: Show) -> None:
    assert obeyed(show) == []


@pytest.mark.parametrize("place", [place for place in PLACES if place != "the end of an answer"])
def test_each_would_be_without_the_filter(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Open:
        def feed(self, text: str) -> str:
            return text

    for module in (render, status_bar, settings, sessions):
        monkeypatch.setattr(module, "one_line", str)
    monkeypatch.setattr(render, "strip_escapes", str)
    monkeypatch.setattr(render, "EscapeFilter", Open)
    assert len(obeyed(PLACES[place])) > 200


def test_drawn_markdown_has_colours_and_nothing_else() -> None:
    out = io.StringIO()
    with Display(MarkdownPrinter(out, 70), io.StringIO()).answer() as draw:
        for payload in PAYLOADS:
            draw(
                f"one{payload} **two** `{payload}`\n\n[{payload}](http://{payload}/ '{payload}')\n"
            )
            draw(f"```{payload}\n{payload}\n```\n")
        for code in (*range(0x20), *range(0x7F, 0xA0), *map(ord, BIDI)):
            draw(f"&#{code}; &#x{code:x};]0;owned&#7; [&#{code};](http://x/&#{code};)\n\n")
    assert CONTROLS.findall(COLOR.sub("", out.getvalue())) == []
    assert "two" in out.getvalue()


def test_raw_answers_are_as_they_came_and_nothing_else_is() -> None:
    out, err = io.StringIO(), io.StringIO()
    display = Display(PlainDrawer(out), err, is_raw=True)
    answered(display, "\x1b[2J")
    display.error("\x1b[2J")
    display.turn("\x1b[2J", "\x1b[2J")
    assert out.getvalue() == "\x1b[2J\n"
    assert "\x1b" not in err.getvalue()
