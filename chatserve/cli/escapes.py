"""Text from a model or a server, made safe for a terminal: a streaming filter of control codes.

Knows characters only: no terminal, no colours, no Markdown. Follows ECMA-48 and the state machine
of VT terminals (Williams, "A parser for DEC's ANSI-compatible video terminals"), with one
difference: a control string ends with its line, so that a stray introducer cannot swallow the rest
of an answer.
"""

from __future__ import annotations

import re
from enum import Enum, auto

_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_UNSAFE = re.compile(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f{_BIDI}\ud800-\udfff]")
_CANCEL = "\x18\x1a"
_STRING_END = "\x07\x9c"


class _State(Enum):
    TEXT = auto()
    ESCAPE = auto()
    ESCAPE_INTERMEDIATE = auto()
    CSI = auto()
    STRING = auto()


_C1_STATES = {"\x9b": _State.CSI} | dict.fromkeys("\x90\x98\x9d\x9e\x9f", _State.STRING)
_ESCAPE_STATES = {"[": _State.CSI} | dict.fromkeys("PX]^_", _State.STRING)


class EscapeFilter:
    """Removes C0 (but newline and tab), C1, CSI, OSC, DCS and bidirectional controls from a stream.

    Sequences may be cut anywhere between two calls. Nothing is held back: text that belongs to no
    sequence comes out of the call that brought it. Lone surrogates become U+FFFD.
    """

    def __init__(self) -> None:
        self._state = _State.TEXT

    def feed(self, chunk: str) -> str:
        """Return what of `chunk` is text."""
        if self._state is _State.TEXT and not _UNSAFE.search(chunk):
            return chunk
        return "".join(map(self._take, chunk))

    def _take(self, char: str) -> str:
        if char == "\x1b":
            self._state = _State.ESCAPE
        elif char in _CANCEL:
            self._state = _State.TEXT
        elif char in _C1_STATES:
            self._state = _C1_STATES[char]
        elif self._state is _State.TEXT:
            return _visible(char)
        elif self._state is _State.STRING:
            return self._take_in_string(char)
        else:
            return self._take_in_sequence(char)
        return ""

    def _take_in_string(self, char: str) -> str:
        if char in _STRING_END or char == "\n":
            self._state = _State.TEXT
        return "\n" if char == "\n" else ""

    def _take_in_sequence(self, char: str) -> str:
        """Inside ESC … or CSI …: a terminal still obeys control characters there."""
        if char < " ":
            return _visible(char)
        if char > "~":
            self._state = _State.TEXT
            return _visible(char)
        if self._state is _State.CSI:
            if char >= "@":
                self._state = _State.TEXT
        elif char < "0":
            self._state = _State.ESCAPE_INTERMEDIATE
        elif self._state is _State.ESCAPE:
            self._state = _ESCAPE_STATES.get(char, _State.TEXT)
        else:
            self._state = _State.TEXT
        return ""


def strip_escapes(text: str) -> str:
    """The whole of `text` through a fresh `EscapeFilter`."""
    return EscapeFilter().feed(text)


def one_line(text: str) -> str:
    """`text` without escapes, on one line: for names and messages that others wrote."""
    return " ".join(strip_escapes(text).split())


def _visible(char: str) -> str:
    if not _UNSAFE.match(char):
        return char
    return "\ufffd" if "\ud800" <= char <= "\udfff" else ""
