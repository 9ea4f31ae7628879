"""Drawing: answers on one stream as they come, everything else on another.

Knows text streams and colours; no HTTP, no line editor. Whatever others wrote (answers, names,
error messages, loaded turns) passes the escape filter here, the last place before the terminal.
"""

from __future__ import annotations

import base64
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TextIO

from chatserve.cli.answer import Progress
from chatserve.cli.columns_drawer import ColumnsDrawer
from chatserve.cli.escapes import EscapeFilter, one_line, strip_escapes
from chatserve.cli.theme import Theme, theme_of
from chatserve.cli.word_wrap import WordWrap, wrapped
from chatserve.errors import UsageError

_DIM = "\x1b[2m"
_RED = "\x1b[31m"
_RESET = "\x1b[0m"
_AUTO = theme_of("auto", None)
_ERASE_LINE = "\r\x1b[2K"
_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"
_BAR_WIDTH = 20
_MIN_FRAME_S = 0.05
MAX_OSC52_LEN = 74_994  # what xterm takes, in base64; others take more
_DRAWING_SHARE = 0.015
_MAX_FRAME_S = 0.4
_MAX_DRAWING_SHARE = 0.1


class AnswerDrawer(Protocol):
    """Draws one answer after the other; always `begin`, any number of `draw`, `end`.

    `status` is asked for one line below the answer, where one can be that does not stay.
    """

    def begin(self, status: Callable[[], str] | None = None) -> None: ...
    def draw(self, text: str) -> None: ...
    def end(self) -> None: ...


class PlainDrawer:
    """Writes text as it comes and ends it with one newline."""

    def __init__(
        self,
        out: TextIO,
        prefix: str = "",
        *,
        blank_line_after: bool = False,
        columns: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`columns` returns the width at which lines are to end between words, or None."""
        self._out = out
        self._columns = columns
        self._wrap = WordWrap()
        self._prefix = prefix
        self._blank_line_after = blank_line_after
        self._ends_line = True

    def begin(self, status: Callable[[], str] | None = None) -> None:
        self._ends_line = not self._prefix
        self._wrap = WordWrap()
        self._write(self._prefix)

    def draw(self, text: str) -> None:
        if text:
            self._ends_line = text.endswith("\n")
            columns = self._columns()
            self._write(text if columns is None else self._wrap.feed(text, columns))

    def end(self) -> None:
        self._write(("" if self._ends_line else "\n") + ("\n" if self._blank_line_after else ""))

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class MarkdownPrinter:
    """Draws Markdown once, when it is whole: for files and pipes, which show no frames."""

    def __init__(self, out: TextIO, columns: int, *, theme: Theme = _AUTO) -> None:
        self._out = out
        self._columns = columns
        self._theme = theme
        self._text = ""

    def begin(self, status: Callable[[], str] | None = None) -> None:
        self._text = ""

    def draw(self, text: str) -> None:
        self._text += text

    def end(self) -> None:
        from chatserve.cli.live_markdown import drawn_once  # late: rich takes 0.1 s to import

        self._out.write(drawn_once(self._text, self._columns, self._theme))
        self._out.flush()


class MarkdownDrawer:
    """Draws Markdown on a terminal, in a thread of its own.

    Text is taken without waiting for the terminal, and Ctrl-C, which hits the main thread, never
    tears a frame. Drawing takes little of the time: the model may run on the same cores.
    """

    def __init__(
        self,
        out: TextIO,
        size: Callable[[], tuple[int, int]],
        *,
        theme: Theme = _AUTO,
        blank_line_after: bool = False,
    ) -> None:
        """`size` returns the terminal's columns and rows."""
        self._out = out
        self._size = size
        self._theme = theme
        self._status: Callable[[], str] | None = None
        self._blank_line_after = blank_line_after
        self._waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def begin(self, status: Callable[[], str] | None = None) -> None:
        self._waiting = queue.SimpleQueue()
        self._status = status
        self._ending.clear()
        self._thread = threading.Thread(target=self._run, name="draw", daemon=True)
        self._thread.start()

    def draw(self, text: str) -> None:
        self._waiting.put(text)

    def end(self) -> None:
        """Wait until all is drawn. Raises what went wrong in the thread, such as `OSError`."""
        self._waiting.put(None)
        self._ending.set()
        if self._thread is not None:
            try:
                self._thread.join()
            finally:
                self._thread.join()  # a Ctrl-C must not leave a thread that goes on drawing
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _run(self) -> None:
        try:
            self._draw_all()
        except Exception as failure:  # raised again in `end`, in the main thread
            self._failure = failure

    def _draw_all(self) -> None:
        from chatserve.cli.live_markdown import LiveMarkdown  # late: rich takes 0.1 s to import

        markdown = LiveMarkdown(self._theme)
        is_open = True
        while is_open:
            text, is_open = self._take()
            started = time.perf_counter()
            if text:
                status = one_line(self._status()) if self._status is not None else ""
                self._write(markdown.feed(text, *self._size(), status))
            self._ending.wait(_frame_s(time.perf_counter() - started))
        self._write(markdown.finish(self._size()[0]) + ("\r\n" if self._blank_line_after else ""))

    def _take(self) -> tuple[str, bool]:
        """All text that waits, at least one piece; False after the last."""
        pieces = []
        piece = self._waiting.get()
        while piece is not None:
            pieces.append(piece)
            try:
                piece = self._waiting.get_nowait()
            except queue.Empty:
                return "".join(pieces), True
        return "".join(pieces), False

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def _frame_s(drawing_s: float) -> float:
    """How long to wait after a frame that took so long: little of the time is for drawing,
    and up to a tenth where the answer would seem to stand still."""
    wished_s = min(drawing_s / _DRAWING_SHARE, _MAX_FRAME_S)
    return max(_MIN_FRAME_S, wished_s, drawing_s / _MAX_DRAWING_SHARE)


class SeveralAnswers:
    """What a display draws answers with that come at the same time."""

    def __init__(self, drawer: ColumnsDrawer, num_answers: int) -> None:
        self._drawer = drawer
        self._filters = [EscapeFilter() for _ in range(num_answers)]

    def draw(self, index: int, text: str) -> None:
        self._drawer.draw(index, self._filters[index].feed(text))

    def wait(self, index: int, text: str) -> None:
        """What the answer waits for, in words that go when it begins."""
        self._drawer.wait(index, one_line(text))

    def end(self, index: int) -> None:
        self._drawer.end(index)

    def show(self) -> None:
        self._drawer.show()


class Display:
    """All that a chat shows: answers through `drawer`, notes, errors and progress on `err`.

    `is_terminal` says that `err` has colours and can redraw a line.
    """

    def __init__(
        self,
        drawer: AnswerDrawer,
        err: TextIO,
        *,
        is_raw: bool = False,
        is_terminal: bool = False,
        has_free_line: bool = True,
        has_color: bool = True,
        columns: Callable[[], int | None] = lambda: None,
        columns_drawer: ColumnsDrawer | None = None,
        take_thought: Callable[[str], None] | None = None,
    ) -> None:
        """`columns` returns the width of `err`, or None when lines there have no end.
        `columns_drawer` is for several answers at the same time, where that can be. `take_thought`
        is told each piece of what the model thinks; without it a line counts them.

        `has_free_line`: nothing stands where an answer is about to begin.
        """
        self._drawer = drawer
        self._err = err
        self._is_raw = is_raw
        self._is_terminal = is_terminal
        self._has_free_line = has_free_line
        self._has_color = has_color
        self._columns = columns
        self._has_progress = False
        self._thought_at = float("-inf")
        self._columns_drawer = columns_drawer
        self._take_thought = take_thought

    @property
    def has_columns(self) -> bool:
        """Whether several answers can be drawn at the same time."""
        return self._columns_drawer is not None

    @contextlib.contextmanager
    def answers(self, titles: Sequence[str]) -> Iterator[SeveralAnswers]:
        """Draw several answers at the same time; only where there are columns."""
        assert self._columns_drawer is not None
        if self._has_progress:
            self._redraw(None)
        self._columns_drawer.begin(titles)
        try:
            yield SeveralAnswers(self._columns_drawer, len(titles))
        finally:
            self._columns_drawer.finish(len(titles))

    def copy(self, text: str) -> str:
        """Let the terminal put `text` on the clipboard; what has done it. Raises `UsageError`."""
        if self._columns() is None:
            raise UsageError("standard error is no terminal that could copy")
        data = base64.b64encode(text.encode("utf-8", "replace")).decode()
        if len(data) > MAX_OSC52_LEN:
            raise UsageError(
                f"{len(text):,} characters are too many for a terminal: {len(data):,} bytes in "
                f"base64, of which {MAX_OSC52_LEN:,} are sure to be taken; /export writes a file"
            )
        self._err.write(f"\x1b]52;c;{data}\x07")
        self._err.flush()
        return "the terminal (OSC 52)"

    @contextlib.contextmanager
    def answer(self, status: Callable[[], str] | None = None) -> Iterator[Callable[[str], None]]:
        """Draw one answer with the function that this gives; its end is drawn in any case.

        `status` tells, in another thread, what may stand below it.
        """
        escape_filter = EscapeFilter()

        def draw(text: str) -> None:
            if self._has_progress and text:
                self.progress(None)
            self._drawer.draw(text if self._is_raw else escape_filter.feed(text))

        self._drawer.begin(status)
        try:
            yield draw
        finally:
            if self._has_progress:
                self.progress(None)
            self._drawer.end()

    def note(self, text: str) -> None:
        """Something worth knowing that is not part of an answer."""
        self._write(_DIM, strip_escapes(text))

    def error(self, text: str) -> None:
        """What went wrong, on one line."""
        self._write(_RED, "error: " + one_line(text))

    def turn(self, role: str, text: str) -> None:
        """A turn of a loaded conversation."""
        self._write("", f"{one_line(role)}: {strip_escapes(text)}")

    def progress(self, progress: Progress | None) -> None:
        """Redraw the line that says how far the server is; None takes it away."""
        if not self._is_terminal:
            return
        self._redraw(None if progress is None else progress_text(progress))

    def place(self, place: int) -> None:
        """Redraw the line that says how many come before this answer; it goes when that begins."""
        if self._is_terminal and self._has_free_line:
            self._redraw(place_text(place))

    def loading(self, progress: Progress) -> None:
        """The same for how far the model is that it waits for."""
        if self._is_terminal and self._has_free_line:
            self._redraw(progress_text(progress))

    def thinking(self, piece: str, num_chars: int, *, has_begun: bool = False) -> None:
        """The same for a model that thinks before it answers, so many characters until now.

        `has_begun`: the answer stands there already, and no line.
        """
        if self._take_thought is not None:
            self._take_thought(piece)
            return
        if has_begun or not (self._is_terminal and self._has_free_line):
            return
        now = time.perf_counter()
        if now - self._thought_at >= _MIN_FRAME_S:
            self._thought_at = now
            self._redraw(f"{_DIM}{thinking_text(num_chars)}{_RESET}")

    def _redraw(self, line: str | None) -> None:
        if line is not None:
            # a line that is too long is cut: one that wrapped could not be erased
            self._err.write(_ERASE_LINE + _NO_WRAP + line + _WRAP)
        elif self._has_progress:
            self._err.write(_ERASE_LINE)
        self._has_progress = line is not None
        self._err.flush()

    def _write(self, color: str, text: str) -> None:
        if self._has_progress:
            self._redraw(None)
        if (columns := self._columns()) is not None:
            text = wrapped(text, columns)
        if color == _RED and not self._has_color:
            color = ""
        colored = f"{color}{text}{_RESET}" if self._is_terminal and color else text
        self._err.write(colored + "\n")
        self._err.flush()


def place_text(place: int) -> str:
    """`next in the queue`, `2nd in the queue`, … `11th in the queue`."""
    if place == 1:
        return "next in the queue"
    is_teen = place % 100 in (11, 12, 13)
    ending = "th" if is_teen else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place:,}{ending} in the queue"


def thinking_text(num_chars: int) -> str:
    """How much a model has thought that has not begun to answer."""
    return f"thinking … {num_chars:,} characters"


def progress_text(progress: Progress) -> str:
    """`loading NAME ███████░░░ 70%  189 / 270 MB`; before the bytes are known, the state alone."""
    name = one_line(progress.name) or "the server"
    if not progress.total_bytes:
        return f"{one_line(progress.state) or 'starting'} {name} …"
    done = min(progress.loaded_bytes / progress.total_bytes, 1.0)
    bar = "█" * int(done * _BAR_WIDTH)
    return (
        f"{one_line(progress.state) or 'loading'} {name} {bar:░<{_BAR_WIDTH}} {done:4.0%}  "
        f"{progress.loaded_bytes / 1e6:,.0f} / {progress.total_bytes / 1e6:,.0f} MB"
    )
