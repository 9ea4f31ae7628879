"""Nothing that a model writes may reach the terminal as anything but text."""

from __future__ import annotations

import pyte
import pytest

from chatserve.cli.escapes import EscapeFilter, one_line, strip_escapes

INTRODUCERS = ("\x1b]", "\x9d", "\x1bP", "\x90", "\x1b_", "\x9f", "\x1b^", "\x9e", "\x1bX", "\x98")
TERMINATORS = ("\x07", "\x1b\\", "\x9c", "\x18", "\x1a")
STRING_BODIES = ("0;owned", "52;c;aGk=", "8;;http://evil.example", "q#0;2;0;0;0~~", "")
CSI_BODIES = (
    "2J", "31m", "38;2;1;2;3m", "?1049h", "?25l", "H", "10;10H", "6n", "c", ">0c", "?2004h",
    "1;5r", "3g", "!p", "20t", "?1000h", "4h", "0 q", "999D", "1K", "s", "u", "$p", "?5$p",
)  # fmt: skip
ESC_SEQUENCES = (
    "\x1bc", "\x1b7", "\x1b8", "\x1bM", "\x1bD", "\x1bE", "\x1b=", "\x1b>", "\x1b(0", "\x1b)B",
    "\x1b#8", "\x1b%G", "\x1b F", "\x1b\x1b[31m", "\x1b[31\x1b[1m", "\x1b\x18", "\x1b[3\x1a",
)  # fmt: skip
BIDI = ("\u061c", "\u200e", "\u200f", "\u202a", "\u202d", "\u202e", "\u2066", "\u2069")
CONTROLS = (*map(chr, (0, 1, 5, 7, 8, 11, 12, 13, 14, 15, 0x7F, 0x84, 0x85, 0x88, 0x8D, 0x9C)),)
PAYLOADS = [
    *(start + body + end for start in INTRODUCERS for body in STRING_BODIES for end in TERMINATORS),
    *(csi + body for csi in ("\x1b[", "\x9b") for body in CSI_BODIES),
    *ESC_SEQUENCES,
    *CONTROLS,
    *BIDI,
]


def filtered(*chunks: str) -> str:
    escape_filter = EscapeFilter()
    return "".join(escape_filter.feed(chunk) for chunk in chunks)


def played(text: str) -> pyte.Screen:
    screen = pyte.Screen(40, 4)
    pyte.Stream(screen).feed(text.replace("\n", "\r\n"))
    return screen


def test_there_are_three_hundred_payloads() -> None:
    assert len(PAYLOADS) >= 300


@pytest.mark.parametrize("payload", PAYLOADS, ids=repr)
def test_a_payload_leaves_only_text_at_every_cut(payload: str) -> None:
    text = f"你好{payload}ok\nnext"
    for cut in range(len(text) + 1):
        assert filtered(text[:cut], text[cut:]) == "你好ok\nnext"


@pytest.mark.parametrize("payload", PAYLOADS, ids=repr)
def test_a_terminal_shows_plain_text_and_keeps_its_state(payload: str) -> None:
    before = pyte.Screen(40, 4)
    screen = played(filtered(*f"one{payload} two\nthree"))
    assert [line.rstrip() for line in screen.display] == ["one two", "three", "", ""]
    assert (screen.title, screen.mode, screen.margins) == (before.title, before.mode, None)
    assert screen.cursor.attrs == before.cursor.attrs


def test_without_the_filter_the_same_payloads_do_harm() -> None:
    assert played("one\x1b[2Jtwo").display[0].strip() == "two"
    assert played("\x1b]0;owned\x07").title == "owned"


def test_an_unterminated_control_string_ends_with_its_line() -> None:
    assert filtered("a\x1b]0;never", " closed\nb") == "a\nb"


def test_text_between_sequences_is_not_held_back() -> None:
    escape_filter = EscapeFilter()
    assert escape_filter.feed("a") == "a"
    assert escape_filter.feed("\x1b[31") == ""
    assert escape_filter.feed("mred") == "red"


def test_emoji_with_joiners_tabs_and_newlines_stay() -> None:
    text = "👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿\tתודה\nمرحبا é\u00a0…"
    assert strip_escapes(text) == text


def test_a_control_character_inside_a_sequence_is_still_seen() -> None:
    assert strip_escapes("\x1b[3\n1mred") == "\nred"


def test_a_letter_that_no_sequence_may_hold_ends_it() -> None:
    assert strip_escapes("\x1b[3你好") == "你好"


def test_lone_surrogates_become_replacement_characters() -> None:
    assert strip_escapes("a\ud83db") == "a\ufffdb"


def test_one_line_joins_lines_and_strips() -> None:
    assert one_line(" model\x1b[2J\r\n name\t") == "model name"
