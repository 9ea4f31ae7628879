"""Lines that end between words: text for a terminal, which by itself cuts words at its edge.

Knows characters and their widths only. Text must be free of escapes; it may come in pieces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

_TAB_WIDTH = 8
_SECOND_COLUMN = re.compile(r"\S.*?  +(?=\S)")


class WordWrap:
    """Breaks lines of one text as it comes; nothing is held back.

    When the rest of a word shows that it does not fit, what is on the screen of it is erased with
    backspaces and written again on the next line.
    """

    def __init__(self, indent: int = 0) -> None:
        """Lines that follow a break begin with `indent` spaces."""
        self._indent = indent
        self._column = 0
        self._word = ""  # the narrow word at the end of the line, as far as it has come

    def feed(self, text: str, columns: int) -> str:
        """What to write to a terminal of this width."""
        # one column stays free: at the very edge terminals disagree on where the cursor is
        limit = max(columns - 1, self._indent + 2)
        return "".join(out for piece in pieces(text) for out in self._take(piece, limit))

    def _take(self, piece: str, limit: int) -> Iterator[str]:
        width = sum(map(width_of, piece))
        if piece == "\n":
            self._column, self._word = 0, ""
            yield piece
        elif piece in " \t":
            self._word = ""
            if piece == "\t":
                width = _TAB_WIDTH - self._column % _TAB_WIDTH
            # the space at which a line breaks is not seen
            yield piece if self._column + width <= limit else ""
            self._column = min(self._column + width, limit)
        elif _is_wide(piece):
            yield (self._break() if self._column + width > limit else "") + piece
            self._column, self._word = self._column + width, ""
        else:
            yield from self._take_word(piece, limit)

    def _take_word(self, piece: str, limit: int) -> Iterator[str]:
        word = self._word + piece
        shown = sum(map(width_of, self._word))
        start = self._column - shown
        if start > self._indent and start + sum(map(width_of, word)) > limit:
            yield "\b" * shown + " " * shown + self._break()
            piece = word
        for char in piece:
            if self._column + width_of(char) > limit:  # longer than a line
                yield self._break()
            self._column += width_of(char)
            self._word += char
            yield char

    def _break(self) -> str:
        self._column, self._word = self._indent, ""
        return "\n" + " " * self._indent


def wrapped(text: str, columns: int) -> str:
    """The whole of `text`; lines of a table go on below its second column."""
    lines = []
    for line in text.split("\n"):
        table = _SECOND_COLUMN.match(line)
        indent = table.end() if table and table.end() <= columns // 2 else 0
        lines.append(WordWrap(indent).feed(line, columns))
    return "\n".join(lines)


def cut_to(line: str, columns: int) -> str:
    """As much of `line` as fits."""
    width = 0
    for place, char in enumerate(line):
        width += width_of(char)
        if width > columns:
            return line[:place]
    return line


def pieces(text: str) -> Iterator[str]:
    """Words, and each blank and each wide character by itself."""
    word = ""
    for char in text:
        if char in "\n \t" or _is_wide(char):
            if word:
                yield word
            word = ""
            yield char
        else:
            word += char
    if word:
        yield word


def _is_wide(char: str) -> bool:
    """Chinese, emoji: a line may end before each."""
    return len(char) == 1 and width_of(char) == 2


@cache
def width_of(char: str) -> int:
    """How many columns a character takes."""
    if char < "\x7f":
        return 1
    from rich.cells import get_character_cell_size  # late: English text does without its tables

    return get_character_cell_size(char)
