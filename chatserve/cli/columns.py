"""Two texts that grow at the same time, side by side on a terminal.

Turns text into terminal output and keeps track of what is on the screen; owns no stream and no
thread. Text must be free of escapes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import zip_longest

from chatserve.cli.word_wrap import pieces, width_of

MIN_COLUMNS = 60
_BETWEEN = " │ "
_BEGIN_FRAME, _END_FRAME = "\x1b[?2026h", "\x1b[?2026l"
_ERASE_BELOW = "\x1b[J"
_MIN_LIVE_ROWS = 3


class Columns:
    """A row is final when each column has a whole line there; others are drawn again and again.

    Of rows that are not final only as many are shown as the screen has: a column that is far ahead
    shows its end, and what is above comes with the rows that become final.
    """

    def __init__(self, titles: Sequence[str]) -> None:
        self._columns = [_Column() for _ in titles]
        self._head = [list(titles), ["─" * _text_width(title) for title in titles]]
        self._width = 0
        self._shown: list[str] = []  # live rows; the cursor is at the beginning of the row below

    def feed(self, index: int, text: str) -> None:
        """Take more text of one column."""
        self._columns[index].text += text.replace("\t", "    ")

    def wait(self, index: int, text: str) -> None:
        """Show one line of what this column waits for, until its text begins."""
        self._columns[index].waits_for = text

    def end(self, index: int) -> None:
        """No more text of this column comes."""
        self._columns[index].is_over = True

    def frame(self, columns: int, rows: int) -> str:
        """What to write to a terminal of this size to show all that has come."""
        is_moved = self._begin(columns)
        for column in self._columns:
            column.wrap(self._width)
        final = [self._row(cells) for cells in self._head]
        self._head = []
        for _ in range(self._num_final()):
            lines = [column.lines.popleft() if column.lines else "" for column in self._columns]
            final.append(self._row(lines))
        unfinished = zip_longest(*(column.unfinished() for column in self._columns), fillvalue="")
        live = [self._row(cells) for cells in unfinished][-max(rows - 2, _MIN_LIVE_ROWS) :]
        if not final and live == self._shown:
            return ""
        up = f"\x1b[{len(self._shown)}A\r{_ERASE_BELOW}" if self._shown and not is_moved else ""
        self._shown = live
        text = "".join(row + "\r\n" for row in (*final, *live))
        return _BEGIN_FRAME + up + text + _END_FRAME

    def _begin(self, columns: int) -> bool:
        """Whether the width has changed: then nobody knows where the old rows are."""
        # one column stays free: at the very edge terminals disagree on where the cursor is
        width = max((columns - 1 - len(_BETWEEN)) // 2, 1)
        is_moved = self._width not in (0, width)
        self._width = width
        return is_moved

    def _num_final(self) -> int:
        open_ones = [len(column.lines) for column in self._columns if not column.is_over]
        return min(open_ones, default=max(len(column.lines) for column in self._columns))

    def _row(self, cells: Sequence[str]) -> str:
        padded = [_padded(cell, self._width) for cell in cells]
        return _BETWEEN.join(padded).rstrip()


class _Column:
    """Text that has not been wrapped yet, whole lines that are not final, and the line at its
    end."""

    def __init__(self) -> None:
        self.text = ""
        self.lines: deque[str] = deque()
        self.is_over = False
        self.waits_for = ""
        self._has_begun = False
        self._tail = ""
        self._width = 0

    def wrap(self, width: int) -> None:
        if width < self._width:
            self.lines = deque(part for line in self.lines for part in _wrapped(line, width))
        self._width = width
        if self.text:
            self._has_begun = True
            *whole, last = (self._tail + self.text).split("\n")
            self.text = ""
            for paragraph in whole:
                self.lines += _wrapped(paragraph, width)
            *more, self._tail = _wrapped(last, width)
            self.lines += more
        if self.is_over and self._tail:
            self.lines.append(self._tail)
            self._tail = ""

    def unfinished(self) -> list[str]:
        if not (self._has_begun or self.is_over):
            return [self.waits_for] if self.waits_for else []
        return [*self.lines, self._tail] if self._tail else list(self.lines)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width`, blanks at their ends left aside; together they are `text`."""
    lines, line, used = [], "", 0
    for piece in pieces(text):
        size = _text_width(piece)
        if used + size > width and piece.strip() and line.strip():
            lines.append(line)
            line, used = "", 0
        for char in piece:
            if used + width_of(char) > width and char != " ":  # longer than a line
                lines.append(line)
                line, used = "", 0
            line += char
            used += width_of(char)
    return [*lines, line]


def _padded(line: str, width: int) -> str:
    line = line.rstrip(" ")
    while (size := _text_width(line)) > width:  # a title
        line = line[:-1]
    return line + " " * (width - size)


def _text_width(text: str) -> int:
    return sum(map(width_of, text))
