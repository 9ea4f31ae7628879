"""Growing Markdown on a real terminal emulator: what counts is the screen."""

from __future__ import annotations

from collections.abc import Callable

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatserve.cli.block_cuts import Rest
from chatserve.cli.escapes import strip_escapes
from chatserve.cli.live_markdown import LiveMarkdown

COLUMNS = 40
SAMPLE = """# Title

Some **bold** text, `code` and a [link](http://example.com/a).
A second line.

1. first
2. second

   indented
3. 你好，世界

| a | b |
|---|---|
| 1 | long cell |

```python
def f(x):
    return x
```

> quote

done
"""
SCREEN = """\
                 Title

Some bold text, code and a link
(http://example.com/a).
A second line.

 1 first
 2 second
   indented
 3 你好，世界

 a  b
 ────────────
 1  long cell

 def f(x):
     return x

▌ quote

done
"""


class Player:
    """Feeds a `LiveMarkdown` and plays what it writes on a screen with history."""

    def __init__(self, rows: int = 40, columns: int = COLUMNS) -> None:
        self.rows, self.columns = rows, columns
        self.markdown = LiveMarkdown()
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=1)
        self.stream = pyte.Stream(self.screen)

    def feed(self, text: str) -> str:
        written = self.markdown.feed(text, self.columns, self.rows)
        self.stream.feed(written)
        return written

    def finish(self) -> str:
        self.stream.feed(self.markdown.finish(self.columns))
        return self.text

    @property
    def text(self) -> str:
        """All lines, scrolled out or not, without blank ones at the end."""
        above = [
            "".join(line[x].data for x in range(self.columns)) for line in self.screen.history.top
        ]
        lines = [line.rstrip() for line in (*above, *self.screen.display)]
        return "\n".join(lines).rstrip("\n") + "\n"


def shown(*chunks: str, rows: int = 40) -> str:
    player = Player(rows)
    for chunk in chunks:
        player.feed(chunk)
    return player.finish()


def test_a_document_is_drawn_whole() -> None:
    assert shown(SAMPLE) == SCREEN


@pytest.mark.parametrize("rows", [6, 12, 40])
def test_drawing_it_piece_by_piece_ends_in_the_same_lines(rows: int) -> None:
    assert shown(*SAMPLE, rows=rows) == SCREEN


def test_an_unfinished_block_is_on_the_screen_already() -> None:
    player = Player()
    player.feed("first\n\nsec")
    assert player.text == "first\n\nsec\n"
    player.feed("ond **bo")
    assert player.text == "first\n\nsecond **bo\n"
    player.feed("ld**")
    assert player.text == "first\n\nsecond bold\n"


def test_a_new_word_rewrites_only_its_line() -> None:
    player = Player()
    player.feed("- one\n- two\n- three")
    assert player.feed(" four").count("\n") == 0
    assert player.feed("") == ""


def test_lines_above_the_screen_are_never_written_again() -> None:
    player = Player(rows=8)
    for number in range(50):
        written = player.feed(f"- item {number}\n")
        assert written.count("\n") <= 8
    assert player.finish() == "".join(f" • item {number}\n" for number in range(50))


def test_a_long_code_block_scrolls_by_and_stays_whole() -> None:
    code = "".join(f"line {number}\n" for number in range(40))
    assert shown(*f"```\n{code}```\nend\n", rows=10) == (
        "".join(f" line {number}\n" for number in range(40)) + "\nend\n"
    )


def test_a_table_higher_than_the_screen_loses_no_row_when_a_wide_one_comes() -> None:
    rows = [f"| {number} | b |\n" for number in range(20)] + ["| a much wider cell | b |\n"]
    text = shown("| x | y |\n", "|---|---|\n", *rows, rows=8)
    assert [line.split()[0] for line in text.split("\n")[2:22]] == [str(n) for n in range(20)]
    assert "a much wider cell" in text


def test_lines_of_a_paragraph_are_kept() -> None:
    assert shown("Roses are red,\nviolets are blue") == "Roses are red,\nviolets are blue\n"


def test_html_and_images_are_shown_as_text() -> None:
    assert shown("<div>\n<think>hm</think>\n</div>") == "<div>\n<think>hm</think>\n</div>\n"
    assert shown("![alt](http://x/y.png)") == "alt (http://x/y.png)\n"


def test_links_say_where_they_lead_and_are_no_escape_sequences() -> None:
    player = Player()
    written = player.feed("[good](http://evil.example) <http://same.example>\n\n")
    assert "\x1b]" not in written
    assert player.finish() == "good (http://evil.example)\nhttp://same.example\n"


@pytest.mark.parametrize("text", ["&#x202e;evil", "`&#x202e;`evil", "a &#27;[2J b", "&#x9b;2J"])
def test_controls_spelled_as_entities_do_not_reach_the_terminal(text: str) -> None:
    written = Player().feed(text + "\n\n")
    assert "\u202e" not in written
    assert "\x1b[2J" not in written
    assert "\x9b" not in written


def test_a_change_of_width_begins_the_block_anew_below() -> None:
    player = Player()
    player.feed("first\n\nsecond\n")
    player.columns = 30
    player.feed("more")
    assert player.finish() == "first\n\nsecond\n\nsecond\nmore\n"


def test_an_empty_answer_draws_nothing() -> None:
    assert shown() == "\n"
    assert shown("", "\n\n") == "\n"


WORDS = "the quick brown fox jumps over **lazy dogs** while `code` is read"
LONG = {
    "paragraph": " ".join([WORDS] * 60),
    "lines": f"{WORDS}\n" * 60,
    "chinese": "你好世界这是一个很长的段落没有空格" * 200,
    "code": "```python\n" + "".join(f"def f{n}(x):\n    return {n}\n\n" for n in range(100)),
    "docstring": "```python\n'''" + "".join(f"def f{n} of words\n" for n in range(200)),
    "indented code": "".join(f"    line {n}\n" for n in range(300)),
    "bullets": "".join(f"- {n} {WORDS}\n" for n in range(60)),
    "numbers": "".join(f"{n}. {WORDS}\n" for n in range(10, 90)),
    "ones": f"10. of several\n\n    {WORDS}\n" * 60,
    "quote": "".join(f"> {n} {WORDS}\n" for n in range(60)),
    "item": "- " + " ".join([WORDS] * 60),
    "last item": "8. one\n9. two\n10. " + " ".join([WORDS] * 60),
    "paragraphs of an item": "- " + f"{WORDS} {WORDS}\n\n  " * 40,
    "lines of an item": "- " + f"{WORDS}\n  " * 60,
    "code of an item": "1. look:\n\n   ```python\n"
    + "".join(f"   def f{n}(x):\n       return {n}\n\n" for n in range(100)),
    "items of an item": "- all of\n" + "".join(f"  - {n} {WORDS}\n" for n in range(60)),
    "items of items": "- all of\n"
    + "".join(f"  - {n} {WORDS}\n    1. {WORDS}\n    2. or not\n" for n in range(30)),
    "another list": "- look:\n\n  ```python\n  f()\n  ```\n\n* " + " ".join([WORDS] * 60),
    "item behind a paragraph": "Look:\n\n- " + " ".join([WORDS] * 60),
    "line of a quote": "> " + " ".join([WORDS] * 60),
    "table": "| a | b |\n|---|---|\n"
    + "| `x` | wide enough |\n| longer | no |\n"
    + "| some | **rows** |\n" * 150,
}


def count_drawn(markdown: LiveMarkdown) -> Callable[[], int]:
    """How many lines it has drawn since now, also of places where it has not been cut."""
    num_drawn, draw = 0, markdown._drawn

    def counted(block: Rest) -> list[str]:
        nonlocal num_drawn
        lines = draw(block)
        num_drawn += len(lines)
        return lines

    markdown._drawn = markdown._cutter._draw = counted  # type: ignore[method-assign]
    return lambda: num_drawn


@pytest.mark.parametrize("name", LONG)
def test_a_long_block_is_cut_unseen(name: str) -> None:
    text = LONG[name]
    tokens = text.split(" ") if name != "chinese" else list(text)
    blank = "" if name == "chinese" else " "
    player = Player(rows=12)
    most = 0
    num_drawn = count_drawn(player.markdown)
    costs = []
    for start in range(0, len(tokens), 16):
        end = "" if start + 16 >= len(tokens) else blank
        player.feed(blank.join(tokens[start : start + 16]) + end)
        most = max(most, len(player.markdown._last.source))
        costs.append(num_drawn())
    assert most < 2500 < len(text)
    # lines drawn, also in vain: the end of an answer costs no more than its begin, but for steps
    third = len(costs) // 3
    assert costs[-1] - costs[-third] < 1.6 * (costs[2 * third] - costs[third])
    whole = "".join(line + "\n" for line in Player().markdown.lines_of(text, COLUMNS))
    assert player.finish().split("\n") == [
        line.rstrip() for line in strip_escapes(whole).split("\n")
    ]


def test_a_block_that_can_only_be_cut_by_force_is() -> None:
    """A template literal: nothing behind its begin looks as it does alone."""
    player = Player(rows=12)
    most = 0
    lines = [f"if (a) {{ return {n} }}\n" for n in range(300)]
    for start in range(0, 300, 10):
        player.feed(
            ("" if start else "```javascript\nlet x = `\n") + "".join(lines[start : start + 10])
        )
        most = max(most, len(player.markdown._last.source))
    assert most < 4000
    assert [line.split()[-2] for line in player.finish().split("\n")[1:301]] == [
        str(n) for n in range(300)
    ]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["a", " ", "\n", "\n\n", "- ", "1. ", "> ", "```", "`", "**", "*", "# ", "| x |", "|-|",
             "---", "===", "[", "](u)", "![", "<b>", "&amp;", "\t", "    ", "你", "🌍", "\\", "~~"]
        ),
        max_size=60,
    ),
    st.integers(4, 9),
)  # fmt: skip
def test_any_text_in_any_pieces_ends_like_the_whole(pieces: list[str], rows: int) -> None:
    whole = [line for line in shown("".join(pieces)).split("\n") if line]
    piecewise = [line for line in shown(*pieces, rows=max(rows, 30)).split("\n") if line]
    assert piecewise == whole
    scrolled = [line for line in shown(*pieces, rows=rows).split("\n") if line]
    assert scrolled == whole
