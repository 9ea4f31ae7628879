"""Markdown that grows, drawn on a terminal without flicker.

Turns text into terminal output and keeps track of what is on the screen; owns no stream and no
thread. Imports rich, which takes a tenth of a second: import this module late.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import cast

from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments.token import (  # type: ignore[import-untyped]  # no stubs on the list
    Comment,
    Generic,
    Keyword,
    Name,
    Number,
    Operator,
    String,
)
from rich.console import Console
from rich.markdown import Markdown
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.theme import Theme as RichTheme

from chatserve.cli.block_cuts import FIRST_ROW, STUB, Cutter, Rest
from chatserve.cli.escapes import strip_escapes
from chatserve.cli.theme import Theme, theme_of
from chatserve.cli.word_wrap import cut_to

_ERASE_TO_LINE_END = "\x1b[K"
_ERASE_BELOW = "\x1b[J"
_MIN_LIVE_LINES = 3
_DECIDED_LEN = 200
_BEGIN_FRAME, _END_FRAME = "\x1b[?2026h", "\x1b[?2026l"
_DIM, _RESET = "\x1b[2m", "\x1b[0m"
_PADDING = re.compile(r" +((?:\x1b\[[0-9;]*m)*)$")
_NEUTRAL = ANSISyntaxTheme(
    {
        Comment: Style(dim=True, italic=True),
        Keyword: Style(color="magenta"),
        Operator.Word: Style(color="magenta"),
        Name.Function: Style(bold=True),
        Name.Class: Style(bold=True),
        Name.Decorator: Style(color="cyan"),
        Name.Tag: Style(color="magenta"),
        Name.Attribute: Style(color="cyan"),
        Number: Style(color="cyan"),
        String: Style(color="green"),
        Generic.Deleted: Style(color="red"),
        Generic.Inserted: Style(color="green"),
        Generic.Heading: Style(bold=True),
    }
)
_AUTO = theme_of("auto", None)


class LiveMarkdown:
    """One answer on the screen.

    Only the last block of the text can still change, so only its lines are ever redrawn, and of
    those only the changed ones. A long block is cut where that cannot be seen, so that a frame
    costs the same however long the answer is. Lines that would leave the screen at its top are
    final: a table that is higher than the screen keeps the column widths it had when its first
    rows went by.
    """

    def __init__(self, theme: Theme = _AUTO) -> None:
        self._parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
        self._console = Console(
            file=io.StringIO(), force_terminal=True, color_system="standard",
            theme=RichTheme(dict(theme.markdown)), no_color=not theme.has_color,
            legacy_windows=False, highlight=False,
        )  # fmt: skip
        self._code_theme = _NEUTRAL if theme.code == "neutral" else Syntax.get_theme(theme.code)
        self._columns = 0
        self._cutter = Cutter(self._parser, self._drawn)
        self._last = Rest()  # the last block, and what may follow it on an unfinished line
        self._num_final = 0  # lines of the last block that are out of reach
        self._is_first = True
        self._shown: list[str] = []  # lines within reach; the cursor is at the end of the last

    def feed(self, text: str, columns: int, rows: int, status: str = "") -> str:
        """Take more text; return what to write to a terminal of this size.

        `status`, which must be free of escapes, stands below until the next frame.
        """
        start = self._begin_frame(columns)
        self._last = replace(self._last, tail=self._last.tail + text)
        final = self._finish_blocks()
        live = self._cut_last(final)
        num_over = max(0, len(live) - max(rows - (4 if status else 2), _MIN_LIVE_LINES))
        self._num_final += num_over
        below = ["", _DIM + cut_to(status, columns - 1) + _RESET] if status else []
        written = self._redraw(final + live[:num_over], live[num_over:] + below)
        return start + (_BEGIN_FRAME + written + _END_FRAME if written else "")

    def finish(self, columns: int) -> str:
        """Return what draws the rest and leaves the cursor on the line below it."""
        start = self._begin_frame(columns)
        lines = self._finish_block(self._last)
        self._last = Rest()
        return start + self._redraw(lines, [])

    def lines_of(self, text: str, columns: int) -> list[str]:
        """A whole text as lines, on no screen."""
        self._begin_frame(columns)
        return [line for block in self._blocks(text) for line in self._finish_block(Rest(block))]

    def _begin_frame(self, columns: int) -> str:
        """After a change of width nobody knows where the old lines are: begin the block anew."""
        has_moved = columns != self._columns and bool(self._shown)
        self._columns = columns
        # one column stays free: at the very edge terminals disagree on where the cursor is
        self._console.width = max(columns - 1, 1)
        if not has_moved:
            return ""
        self._shown, self._num_final = [], 0
        return "\r\n"

    def _blocks(self, text: str) -> list[str]:
        """Cut before each top-level block; an unfinished line belongs to the block before it,
        until it is so long that nothing can make another beginning of it."""
        whole_lines = text[: text.rfind("\n") + 1]
        if len(text) - len(whole_lines) > _DECIDED_LEN:
            whole_lines = text
        starts = sorted(
            {t.map[0] for t in self._parser.parse(whole_lines) if t.level == 0 and t.map}
        )
        lines = text.split("\n")
        cuts = [0, *starts[1:], len(lines)]
        blocks = ["\n".join(lines[a:b]) + "\n" for a, b in pairwise(cuts)]
        return [*blocks[:-1], blocks[-1][:-1]]

    def _finish_blocks(self) -> list[str]:
        """The lines of all blocks but the last."""
        first, *more = self._blocks(self._last.source)
        if not more:
            return []
        final = self._finish_block(replace(self._last, tail=first[len(self._last.head) :]))
        for block in more[:-1]:
            final += self._finish_block(Rest(block))
        self._last = Rest(more[-1])
        return final

    def _finish_block(self, block: Rest) -> list[str]:
        """The lines of a block that are not final yet; the next block begins a new count."""
        lines = self._drawn(block)
        rest = lines[self._num_final :]
        self._num_final = 0
        self._is_first = self._is_first and not lines and not block.is_begun
        self._cutter.begin_block()
        return rest

    def _cut_last(self, final: list[str]) -> list[str]:
        """The lines of the last block that can still change; others go to `final`."""
        lines = self._drawn(self._last)
        rest = self._cutter.cut(self._last, lines, self._num_final)
        if rest is not None:
            self._last = rest
            whole, lines = lines, self._drawn(rest)
            num_cut = max(len(whole) - len(lines), 0)
            final += whole[self._num_final : num_cut]
            self._num_final = max(self._num_final - num_cut, 0)
        return lines[self._num_final :]

    def _drawn(self, block: Rest) -> list[str]:
        """A block as lines of text and colour codes, a blank line first unless it is the first."""
        markdown = Markdown("", hyperlinks=False)
        # rich takes a theme wherever it takes the name of one
        markdown.code_theme = cast("str", self._code_theme)
        markdown.parsed = [_safe(token) for token in self._parser.parse(block.source)]
        if block.first_number is not None:
            markdown.parsed[0].attrs["start"] = block.first_number
        with self._console.capture() as capture:
            self._console.print(markdown)
        lines = [_PADDING.sub(r"\1", line) for line in capture.get().split("\n")]
        if block.has_hidden_rows:
            first = next((n for n, line in enumerate(lines) if FIRST_ROW in line), 0)
            lines = [line.replace(FIRST_ROW, "", 1) for line in lines[first:]]
        if block.has_stub:
            lines = lines[next((n for n, line in enumerate(lines) if STUB in line), -1) + 1 :]
        while lines and not strip_escapes(lines[-1]).strip():
            lines.pop()
        while lines and not strip_escapes(lines[0]).strip():
            lines.pop(0)
        is_first = self._is_first or block.is_begun
        return ["", *lines] if lines and not is_first else lines

    def _redraw(self, final: list[str], live: list[str]) -> str:
        """From the first line that differs from the screen; `final` lines leave our reach."""
        frame, shown = final + live, self._shown
        self._shown = live
        if frame == shown:
            return "\r\n" if frame and not live else ""
        same = 0
        while same < min(len(frame), len(shown)) and frame[same] == shown[same]:
            same += 1
        out = []
        if same == len(shown):
            out.append("\r\n" if shown else "")
        else:
            same = min(same, max(len(frame) - 1, 0))
            num_up = len(shown) - 1 - same
            out.append((f"\x1b[{num_up}A" if num_up else "") + "\r")
        out.append("\r\n".join(line + _ERASE_TO_LINE_END for line in frame[same:]))
        if len(frame) < len(shown):
            out.append(_ERASE_BELOW)
        if frame and not live:
            out.append("\r\n")
        return "".join(out)


def drawn_once(text: str, columns: int, theme: Theme = _AUTO) -> str:
    """The final drawing of a whole answer: lines with colour codes, nothing that moves a cursor."""
    markdown = LiveMarkdown(theme)
    return "".join(line + "\n" for line in markdown.lines_of(text, columns))


def _safe(token: Token) -> Token:
    """A token without terminal escapes: `&#x202e;` becomes a control only when it is parsed."""
    token.content = strip_escapes(token.content)
    token.info = strip_escapes(token.info)
    if token.children:
        token.children = [_safe(child) for child in _flat(token.children)]
    return token


def _flat(children: list[Token]) -> Iterator[Token]:
    """Inline tokens with line breaks kept, and links and images as text with their address.

    rich would join lines, and its links are escape sequences that hide where they lead.
    """
    links: list[tuple[str, list[str]]] = []
    for child in children:
        if child.type == "link_open":
            links.append((str(child.attrs.get("href", "")), []))
        elif child.type == "link_close":
            href, shown = links.pop()
            if href not in ("".join(shown), "mailto:" + "".join(shown)):
                yield Token("text", "", 0, content=f" ({href})")
        elif child.type == "image":
            yield Token("text", "", 0, content=f"{child.content} ({child.attrs.get('src', '')})")
        else:
            for _, shown in links:
                shown.append(child.content)
            yield Token("hardbreak", "br", 0) if child.type == "softbreak" else child
