"""Drawing several answers that come at the same time: side by side where there is room.

Knows a text stream and its size; text must be free of escapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TextIO

from chatserve.cli.columns import MIN_COLUMNS, Columns
from chatserve.cli.word_wrap import WordWrap

_MIN_FRAME_S = 0.05


class ColumnsDrawer:
    """Always `begin`, any number of `draw`, `end` and `show`, then `finish`."""

    def __init__(
        self,
        out: TextIO,
        size: Callable[[], tuple[int, int]],
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`size` returns the terminal's columns and rows."""
        self._out = out
        self._size = size
        self._sleep = sleep
        self._drawing: Columns | _OneByOne = _OneByOne(())

    def begin(self, titles: Sequence[str]) -> None:
        is_wide = self._size()[0] >= MIN_COLUMNS
        self._drawing = Columns(titles) if is_wide else _OneByOne(titles)

    def draw(self, index: int, text: str) -> None:
        self._drawing.feed(index, text)

    def wait(self, index: int, text: str) -> None:
        """Show one line of what an answer waits for, where there are columns, until it begins."""
        if isinstance(self._drawing, Columns):
            self._drawing.wait(index, text)

    def end(self, index: int) -> None:
        """One of the answers is over."""
        self._drawing.end(index)

    def show(self) -> None:
        """Draw what has come; afterwards it waits a moment, so that more can come for the next."""
        self._write()
        self._sleep(_MIN_FRAME_S)

    def finish(self, num_answers: int) -> None:
        """Draw the rest; answers that have not ended end here."""
        for index in range(num_answers):
            self._drawing.end(index)
        self._write()

    def _write(self) -> None:
        self._out.write(self._drawing.frame(*self._size()))
        self._out.flush()


class _OneByOne:
    """The first answer as it comes; the next when those before it are over."""

    def __init__(self, titles: Sequence[str]) -> None:
        self._titles = list(titles)
        self._texts = ["" for _ in titles]
        self._is_over = [False for _ in titles]
        self._now = 0
        self._wrap: WordWrap | None = None

    def feed(self, index: int, text: str) -> None:
        self._texts[index] += text

    def end(self, index: int) -> None:
        self._is_over[index] = True

    def frame(self, columns: int, rows: int) -> str:
        out = ""
        while self._now < len(self._titles):
            if self._wrap is None:
                self._wrap = WordWrap()
                out += f"── {self._titles[self._now]} ──\n"
            text, self._texts[self._now] = self._texts[self._now], ""
            out += self._wrap.feed(text, columns)
            if not self._is_over[self._now]:
                break
            out += "\n\n"
            self._now, self._wrap = self._now + 1, None
        return out
