"""Posts as Markdown: code as it was, nothing of scripts, no text that costs a stack."""

from __future__ import annotations

import sys

import pytest

from chatserve.train.data.markdown import MAX_DEPTH, Unreadable, markdown_of, tidy


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("<p>a <b>b</b></p>\r\n<p>c</p>", "a **b**\n\nc"),
        ("<pre><code>x = 1\n\n\ny &lt; 2  \n</code></pre>", "```\nx = 1\n\n\ny < 2\n```"),
        ("<ul><li>a</li><li><code>b_c</code></li></ul>", "* a\n* `b_c`"),
        ('<a href="/q">l</a> &amp;amp; <img src="i.png" alt="pic">', "[l](/q) &amp; ![pic](i.png)"),
        ("<script>alert(1)</script>hi<!-- c -->", "hi"),
        ("<p> \n</p>", ""),
        ("", ""),
        ("https://a.example/b.html", "https://a.example/b.html"),  # and no warning
    ],
)
def test_html_becomes_markdown(html: str, markdown: str) -> None:
    assert markdown_of(html) == markdown


def test_what_nests_too_deep_is_refused_whoever_calls() -> None:
    deepest = "<b>" * (MAX_DEPTH - 1) + "x" + "</b>" * (MAX_DEPTH - 1)
    assert "x" in markdown_of(deepest)
    with pytest.raises(Unreadable):
        markdown_of(f"<b>{deepest}</b>")
    with pytest.raises(Unreadable):
        markdown_of("<div>" * 30_000)
    assert sys.getrecursionlimit() > 9 * MAX_DEPTH


def test_empty_lines_are_kept_in_code_only() -> None:
    assert tidy("a  \r\n\n\n\nb\n```\n\n\nc\n```\n\n") == "a\n\nb\n```\n\n\nc\n```"
