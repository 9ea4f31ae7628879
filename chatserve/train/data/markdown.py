"""HTML of posts as Markdown. Knows one text at a time."""

from __future__ import annotations

import warnings
from typing import Any

MAX_DEPTH = 100


class Unreadable(Exception):
    """HTML that nests deeper than `MAX_DEPTH`."""


def markdown_of(html: str) -> str:
    """Markdown with markdownify's own settings, as the published pairs have it; "" for no text.

    Raises `Unreadable`.
    """
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning
    from markdownify import MarkdownConverter

    with warnings.catch_warnings():
        # a post may well consist of an address: it is text, and nobody opens it
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        soup = BeautifulSoup(html, "html.parser")
    _check_depth(soup)
    return tidy(MarkdownConverter().convert_soup(soup))


def _check_depth(soup: Any) -> None:
    """The converter recurses: how deep it may go must not hang on who calls it."""
    level = [soup]
    for _ in range(MAX_DEPTH):
        level = [child for tag in level for child in tag.children if hasattr(child, "children")]
        if not level:
            return
    raise Unreadable


def tidy(text: str) -> str:
    """Unix ends of lines, no blanks before them, at most one empty line outside of code."""
    lines: list[str] = []
    is_code = False
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        line = line.rstrip()
        if line.startswith("```"):
            is_code = not is_code
        if line or is_code or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines).strip("\n")
