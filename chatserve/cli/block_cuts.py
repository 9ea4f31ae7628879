"""Where a Markdown block that grows can be cut, so that what is before need not be drawn again.

Knows Markdown's source and the lines that a drawing makes of it, not how it draws.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from markdown_it import MarkdownIt
from markdown_it.token import Token

from chatserve.cli.escapes import strip_escapes

MAX_LINES = 16  # drawn lines of a block before a cut is looked for
_KEPT_LINES = 6
_MAX_TRIES = 4
_FORCED_LINES = 6 * MAX_LINES
_EDGE_LEN = 6
_MARKUP = r"[*_`~\[\]]*"
FIRST_ROW = "\u2063"  # in the first row of a table that is to be seen; takes no column
STUB = "\u2064"  # all that is left of an item's begin; its line is not to be seen
_MARKER = re.compile(r" {0,3}(?:[-+*]|\d{1,9}[.)]) +")
_QUOTE_BAR = "▌"


@dataclass(frozen=True)
class Rest:
    """What is left of a block: `head` and then `tail` are its source.

    is_begun: lines before these are on the screen. first_number: of an ordered list that was cut.
    has_hidden_rows: only what comes from `FIRST_ROW` on is to be seen; the rows before it keep the
    columns as wide as they are. has_stub: nor is what comes until the line with `STUB`, which
    stands for what an item began with.
    """

    tail: str = ""
    head: str = ""
    is_begun: bool = False
    first_number: int | None = None
    has_hidden_rows: bool = False
    has_stub: bool = False

    @property
    def source(self) -> str:
        return self.head + self.tail


class Cutter:
    """Looks for cuts in one block after the other, rarely where there is none."""

    def __init__(self, parser: MarkdownIt, draw: Callable[[Rest], list[str]]) -> None:
        self._parser = parser
        self._draw = draw
        self._least = MAX_LINES

    def begin_block(self) -> None:
        self._least = MAX_LINES

    def cut(self, block: Rest, lines: Sequence[str], num_final: int) -> Rest | None:
        """What is left when `block` is cut; it is drawn as the last of `lines`, those of `block`.

        `num_final` of `lines` cannot be changed any more. None where there is no place: a block
        that could only be cut by force is, when it is long.
        """
        if len(lines) < self._least:
            return None
        tokens = self._parser.parse(block.source)
        kind = tokens[0].type if tokens else ""
        best = None
        for rest in _places(kind, tokens, block, lines, num_final):
            drawn = self._draw(rest)
            if drawn and len(drawn) < len(lines) and list(lines[-len(drawn) :]) == drawn:
                self._least = MAX_LINES
                return rest
            best = best or rest
        self._least = len(lines) + MAX_LINES // 2
        is_forced = kind in ("fence", "paragraph_open") and len(lines) >= _FORCED_LINES
        return best if is_forced else None


def _places(
    kind: str, tokens: list[Token], block: Rest, lines: Sequence[str], num_final: int
) -> Iterator[Rest]:
    if kind.endswith("_list_open"):
        yield from _items(block, tokens)
        yield from _inside_item(block, tokens, lines)
    elif kind == "table_open":
        yield from _rows(block, num_final)
    elif kind == "fence":
        head = block.source[: block.source.find("\n") + 1]
        for place in _line_starts(block.source, len(head)):
            yield Rest(block.source[place:], head, is_begun=True)
    elif kind in ("paragraph_open", "code_block", "blockquote_open"):
        places = [*_line_starts(block.source, 0)]
        if kind == "paragraph_open":
            places = [*places, *_line_ends(block.source, lines)]
        for place in places:
            yield Rest(block.source[place:], is_begun=True)
        if kind == "blockquote_open":
            for place in _line_ends(block.source, lines):
                yield Rest(block.source[place:], "> ", is_begun=True)


def _line_starts(source: str, first: int) -> list[int]:
    """Where the last lines begin, but not the very last ones; at most `_MAX_TRIES`."""
    starts = [match.end() for match in re.finditer("\n", source) if match.end() > first]
    starts = [start for start in starts[:-_KEPT_LINES] if source[start:].partition("\n")[0].strip()]
    return starts[-_MAX_TRIES:][::-1]


def _line_ends(source: str, lines: Sequence[str]) -> Iterator[int]:
    """Where, in a paragraph, lines end as they are drawn."""
    texts = [strip_escapes(line).lstrip(_QUOTE_BAR + " ").rstrip() for line in lines]
    for row in range(len(texts) - _KEPT_LINES, max(len(texts) - _KEPT_LINES - _MAX_TRIES, 1), -1):
        before, after = texts[row - 1][-_EDGE_LEN:], texts[row][:_EDGE_LEN]
        edge = re.escape(before) + rf"({_MARKUP}\s*){_MARKUP}" + re.escape(after)
        # markup makes the source longer than what is drawn of it, by little
        expected = len(source) - sum(len(text) + 1 for text in texts[row:])
        ends = [match.end(1) for match in re.finditer(edge, source)] if before and after else []
        yield from sorted(ends, key=lambda end: abs(end - expected))[:2]


def _items(block: Rest, tokens: list[Token]) -> Iterator[Rest]:
    """Behind an item of a list, but not behind the last ones."""
    starts = _item_starts(tokens)
    source_lines = block.source.split("\n")
    num_tried = 0
    for index in range(len(starts) - 2, 0, -1):
        if len(source_lines) - starts[index] < _KEPT_LINES:
            continue
        yield Rest(
            "\n".join(source_lines[starts[index] :]),
            is_begun=True,
            first_number=_number(block, tokens, index),
        )
        num_tried += 1
        if num_tried == _MAX_TRIES:
            return


def _inside_item(block: Rest, tokens: list[Token], lines: Sequence[str]) -> Iterator[Rest]:
    """Between the lines of the last item, where those that are left can be drawn below a stub."""
    if sum(token.level == 0 and token.nesting != -1 for token in tokens) > 1:
        return  # an unfinished line at the end will begin another block
    starts = _item_starts(tokens)
    begin = len("".join(line + "\n" for line in block.source.split("\n")[: starts[-1]]))
    marker = _MARKER.match(block.source, begin)
    if marker is None:
        return
    stub = f"{marker[0]}{STUB}\n"
    fences = [token for token in tokens if token.type == "fence" and token.map]
    opening = ""
    if fences and fences[-1].map and _is_last(fences[-1], tokens):
        opening = block.source.split("\n")[fences[-1].map[0]] + "\n"
        begin = block.source.rfind(opening)
    rest = Rest(is_begun=True, has_stub=True, first_number=_number(block, tokens, len(starts) - 1))
    for place in _line_starts(block.source, max(begin, len(block.head))):
        is_new = block.source[:place].endswith("\n\n") or bool(opening)
        yield replace(
            rest, head=stub + ("\n" if is_new else "") + opening, tail=block.source[place:]
        )
    if not opening:
        for place in _line_ends(block.source, lines):
            indent = " " * len(marker[0])
            yield replace(rest, head=stub + indent, tail=block.source[place:])


def _item_starts(tokens: list[Token]) -> list[int]:
    """The lines at which the items of a list begin."""
    return [t.map[0] for t in tokens if t.type == "list_item_open" and t.level == 1 and t.map]


def _number(block: Rest, tokens: list[Token], index: int) -> int | None:
    """That of the item `index` in an ordered list."""
    if tokens[0].type != "ordered_list_open":
        return None
    first = block.first_number
    return (int(tokens[0].attrs.get("start", 1)) if first is None else first) + index


def _is_last(fence: Token, tokens: list[Token]) -> bool:
    """Whether nothing but the ends of what it is in comes behind it."""
    behind = tokens[next(n for n, token in enumerate(tokens) if token is fence) + 1 :]
    return all(token.nesting == -1 for token in behind)


def _rows(block: Rest, num_final: int) -> Iterator[Rest]:
    """Behind rows that are out of reach: before, a longer cell still makes its column wider."""
    header, rule, *rows = block.source.split("\n")
    first = 0
    if block.has_hidden_rows:
        first = next((n for n, row in enumerate(rows) if FIRST_ROW in row), 0)
    rows = [row.replace(FIRST_ROW, "") for row in rows]
    num_gone = min(num_final - 3, len(rows) - first - _KEPT_LINES)  # a row may take several lines
    for gone in range(num_gone, max(num_gone - _MAX_TRIES, MAX_LINES // 2), -1):
        hidden = _widest(rows[: first + gone])
        shown = rows[first + gone :]
        shown[0] = re.sub(r"^(\s*\|?\s*)", rf"\g<1>{FIRST_ROW}", shown[0], count=1)
        head = "\n".join([header.replace(FIRST_ROW, ""), rule, *hidden, ""])
        yield Rest("\n".join(shown), head, is_begun=True, has_hidden_rows=True)


def _widest(rows: list[str]) -> list[str]:
    """Of each column the rows with the longest cell, and with the longest word."""
    cells = [re.sub("[*`~]", "", row).strip().strip("|").split("|") for row in rows]
    chosen: set[int] = set()
    for column in range(max(map(len, cells), default=0)):
        there = [n for n, row in enumerate(cells) if column < len(row)]
        chosen.add(max(there, key=lambda n: len(cells[n][column].strip())))
        chosen.add(max(there, key=lambda n: max(map(len, cells[n][column].split()), default=0)))
    return [rows[n] for n in sorted(chosen)]
