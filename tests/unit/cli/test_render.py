"""Drawing on text streams."""

from __future__ import annotations

import io
import re
import threading

import pyte
import pytest

from chatserve.cli.answer import Progress
from chatserve.cli.escapes import strip_escapes
from chatserve.cli.live_markdown import LiveMarkdown
from chatserve.cli.render import (
    Display,
    MarkdownDrawer,
    MarkdownPrinter,
    PlainDrawer,
    place_text,
    progress_text,
)
from chatserve.cli.theme import theme_of


class CountingStream(io.StringIO):
    """Remembers what had been written at each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[str] = []

    def flush(self) -> None:
        if not self.closed:
            self.flushed.append(self.getvalue())


def drawn(drawer: PlainDrawer, out: io.StringIO, *pieces: str) -> str:
    drawer.begin()
    for piece in pieces:
        drawer.draw(piece)
    drawer.end()
    return out.getvalue()


def test_each_piece_is_on_the_screen_at_once() -> None:
    out = CountingStream()
    drawn(PlainDrawer(out), out, "你", "好", "!")
    assert out.flushed[1:4] == ["你", "你好", "你好!"]


@pytest.mark.parametrize(
    ("pieces", "text"),
    [(["hi"], "hi\n"), (["hi\n"], "hi\n"), (["hi\n\n", ""], "hi\n\n"), ([], "")],
)
def test_an_answer_ends_with_a_newline(pieces: list[str], text: str) -> None:
    out = io.StringIO()
    assert drawn(PlainDrawer(out), out, *pieces) == text


def test_a_prefix_and_a_blank_line_after() -> None:
    out = io.StringIO()
    assert drawn(PlainDrawer(out, "[!OP:A]: "), out) == "[!OP:A]: \n"
    out = io.StringIO()
    assert drawn(PlainDrawer(out, blank_line_after=True), out, "hi") == "hi\n\n"


def test_escapes_cut_between_pieces_are_stripped_from_answers_unless_raw() -> None:
    for is_raw, expected in ((False, "ab\n"), (True, "a\x1b[31mb\n")):
        out = io.StringIO()
        with Display(PlainDrawer(out), io.StringIO(), is_raw=is_raw).answer() as draw:
            for piece in ("a\x1b", "[3", "1mb"):
                draw(piece)
        assert out.getvalue() == expected


def test_an_answer_that_breaks_off_still_ends_its_line() -> None:
    out = io.StringIO()
    display = Display(PlainDrawer(out), io.StringIO())
    with pytest.raises(ConnectionError), display.answer() as draw:
        draw("half an")
        raise ConnectionError
    assert out.getvalue() == "half an\n"


def test_notes_errors_and_turns_are_stripped_of_escapes() -> None:
    err = io.StringIO()
    display = Display(PlainDrawer(io.StringIO()), err)
    display.note("saved\x1b[2J")
    display.error("server\r\nsaid \x1b]0;x\x07no")
    display.turn("US\x1b[1mER", "hi\n\x9b31mthere")
    assert err.getvalue() == "saved\nerror: server said no\nUSER: hi\nthere\n"


def test_a_terminal_gets_dim_notes() -> None:
    err = io.StringIO()
    Display(PlainDrawer(io.StringIO()), err, is_terminal=True).note("n")
    assert err.getvalue() == "\x1b[2mn\x1b[0m\n"


def test_progress_is_one_line_that_goes_away_and_only_on_a_terminal() -> None:
    err = io.StringIO()
    display = Display(PlainDrawer(io.StringIO()), err, is_terminal=True)
    display.progress(Progress("m", "loading", 1, 2))
    display.progress(None)
    assert err.getvalue().endswith("\r\x1b[2K")
    display.progress(None)
    plain = io.StringIO()
    Display(PlainDrawer(io.StringIO()), plain).progress(Progress("m"))
    assert plain.getvalue() == ""


def test_progress_stays_on_its_line_on_a_narrow_terminal() -> None:
    err = io.StringIO()
    display = Display(PlainDrawer(io.StringIO()), err, is_terminal=True)
    screen = pyte.Screen(20, 3)
    for loaded_bytes in (1, 2, 3):
        display.progress(Progress("SmolLM2-135M-Instruct", "loading", loaded_bytes, 4))
    pyte.Stream(screen).feed(err.getvalue())
    assert screen.display[0].startswith("loading SmolLM2-135")
    assert "".join(screen.display[1:]).strip() == ""
    display.progress(None)
    pyte.Stream(screen).feed(err.getvalue())
    assert "".join(screen.display).strip() == ""


def test_progress_text() -> None:
    assert progress_text(Progress()) == "starting the server …"
    assert progress_text(Progress("m\x1b[2J", "downloading")) == "downloading m …"
    half = progress_text(Progress("smollm2", "loading", 135_000_000, 270_000_000))
    assert half == "loading smollm2 ██████████░░░░░░░░░░  50%  135 / 270 MB"
    assert "100%" in progress_text(Progress("m", "loading", 3, 2))


def test_markdown_is_drawn_in_the_background_and_whole_at_the_end() -> None:
    out = io.StringIO()
    drawer = MarkdownDrawer(out, lambda: (40, 10), theme=theme_of("none", None))
    for text in ("# One", "two"):
        drawer.begin()
        for char in text:
            drawer.draw(char)
        drawer.end()
    assert out.getvalue().count("One") >= 1
    assert out.getvalue().endswith("two\x1b[K\x1b[?2026l\r\n")


def test_a_status_stands_below_a_live_answer_and_goes_with_its_end() -> None:
    out, screen = io.StringIO(), pyte.Screen(40, 8)
    markdown = LiveMarkdown()
    stream = pyte.Stream(screen)
    stream.feed(markdown.feed("- one\n", 40, 8, "m · 10 tokens/s"))
    assert [line.rstrip() for line in screen.display[:3]] == [" • one", "", "m · 10 tokens/s"]
    assert markdown.feed("", 40, 8, "m · 11 tokens/s").count("one") == 0
    stream.feed(markdown.feed("- two\n" * 20, 40, 8, "你" * 40))
    assert screen.display[-1].rstrip() == "你" * 19
    stream.feed(markdown.finish(40))
    assert "".join(screen.display).strip(" •").endswith("two")
    asked = threading.Event()

    def status() -> str:
        asked.set()
        return "m\x1b[2J"

    drawer = MarkdownDrawer(out, lambda: (40, 10))
    drawer.begin(status)
    drawer.draw("text")
    assert asked.wait(10)
    drawer.end()
    assert "\x1b[2J" not in out.getvalue()


def test_errors_have_no_colour_where_none_is_wanted() -> None:
    for has_color in (True, False):
        err = io.StringIO()
        display = Display(PlainDrawer(err), err, is_terminal=True, has_color=has_color)
        display.error("gone")
        assert ("\x1b[31m" in err.getvalue()) is has_color


def test_a_broken_terminal_is_reported_at_the_end_of_the_answer() -> None:
    out = io.StringIO()
    out.close()
    drawer = MarkdownDrawer(out, lambda: (40, 10))
    drawer.begin()
    drawer.draw("text")
    with pytest.raises(ValueError, match="closed file"):
        drawer.end()
    drawer.begin()
    with pytest.raises(ValueError, match="closed file"):
        drawer.end()


def screen_of(text: str, columns: int = 20) -> list[str]:
    screen = pyte.Screen(columns, 12)
    screen.set_mode(pyte.modes.LNM)
    pyte.Stream(screen).feed(text)
    return [line.rstrip() for line in screen.display if line.strip()]


def test_notes_errors_and_turns_end_their_lines_between_words() -> None:
    err = io.StringIO()
    display = Display(PlainDrawer(io.StringIO()), err, is_terminal=True, columns=lambda: 20)
    display.note("one two three four five six")
    display.error("the quick brown fox jumps")
    display.turn("USER", "hello there, my old friend")
    assert screen_of(err.getvalue()) == [
        "one two three four", "five six", "error: the quick", "brown fox jumps",
        "USER: hello there,", "my old friend",
    ]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_a_live_answer_on_a_terminal_ends_its_lines_between_words(size: int) -> None:
    text = "The quick brown fox jumps\tover the extraordinarily-long-word 你好世界你好 café déjà vu"
    out = CountingStream()
    drawer = PlainDrawer(out, columns=lambda: 20)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    shown = screen_of(drawn(drawer, out, *pieces))
    assert shown[:3] == ["The quick brown fox", "jumps   over the", "extraordinarily-lon"]
    assert shown[3:] == ["g-word 你好世界你好", "café déjà vu"]


def test_a_piece_of_a_word_is_on_the_screen_at_once() -> None:
    out = CountingStream()
    drawn(PlainDrawer(out, columns=lambda: 20), out, "Hel", "lo")
    assert out.flushed[1:3] == ["Hel", "Hello"]


def test_markdown_that_is_printed_moves_no_cursor() -> None:
    for name in ("auto", "dark", "light", "none"):
        out = io.StringIO()
        drawer = MarkdownPrinter(out, 40, theme=theme_of(name, None))
        for _ in range(2):
            drawer.begin()
            drawer.draw("# Ti")
            drawer.draw("tle\n\n- one\n- **two**\n")
            drawer.end()
        lines = strip_escapes(out.getvalue()).split("\n")
        assert lines == [" " * 17 + "Title", "", " • one", " • two"] * 2 + [""]
        assert set(re.findall(r"\x1b\[[0-9;]*(.)", out.getvalue())) == {"m"}
        assert "\r" not in out.getvalue()


def test_a_place_in_the_queue_is_one_line_that_goes_when_the_answer_begins() -> None:
    screen, out = pyte.Screen(40, 3), io.StringIO()
    display = Display(PlainDrawer(out), out, is_terminal=True)
    with display.answer() as draw:
        draw("")
        display.loading(Progress("m", "loading", 10**6, 4 * 10**6))
        assert "loading m" in out.getvalue() and "25%  1 / 4 MB" in out.getvalue()
        for place in (3, 2):
            display.place(place)
        assert "2nd in the queue" in out.getvalue()
        draw("Hello")
        draw(" there")
    pyte.Stream(screen).feed(out.getvalue().replace("\n", "\r\n"))
    assert screen.display[0].rstrip() == "Hello there"


def test_a_place_in_the_queue_goes_when_no_answer_comes() -> None:
    screen, out = pyte.Screen(40, 3), io.StringIO()
    display = Display(PlainDrawer(out), out, is_terminal=True)
    with pytest.raises(KeyboardInterrupt), display.answer():
        display.place(1)
        raise KeyboardInterrupt
    pyte.Stream(screen).feed(out.getvalue().replace("\n", "\r\n"))
    assert "".join(screen.display).strip() == ""


def test_a_model_that_thinks_is_a_dim_line_that_goes_when_the_answer_begins() -> None:
    screen, out = pyte.Screen(40, 3), io.StringIO()
    display = Display(PlainDrawer(out), out, is_terminal=True)
    with display.answer() as draw:
        display.thinking("m", 1234)
        assert "\x1b[2mthinking … 1,234 characters\x1b[0m" in out.getvalue()
        for num_chars in range(1235, 2000):
            display.thinking("m", num_chars)
        assert out.getvalue().count("thinking") < 700  # a line for each is no use to anybody
        draw("Hello")
    pyte.Stream(screen).feed(out.getvalue().replace("\n", "\r\n"))
    assert screen.display[0].rstrip() == "Hello"


@pytest.mark.parametrize("options", [{}, {"is_terminal": True, "has_free_line": False}])
def test_a_place_in_the_queue_is_not_for_pipes_and_programs(options: dict[str, bool]) -> None:
    err = io.StringIO()
    display = Display(PlainDrawer(io.StringIO()), err, **options)
    display.place(2)
    display.thinking("Hm", 2)
    assert err.getvalue() == ""


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (1, "next"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"),
        (13, "13th"), (21, "21st"), (111, "111th"), (1022, "1,022nd"),
    ],
)  # fmt: skip
def test_places_in_words(place: int, text: str) -> None:
    assert place_text(place) == f"{text} in the queue"
