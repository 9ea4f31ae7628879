"""Long pastes, folded: one character stands for each in the line that is edited.

Knows texts only; how such a character is shown is up to the editor. Characters for private use
stand for pastes, of which a terminal can show none.
"""

from __future__ import annotations

import re

from chatserve.errors import UsageError

MAX_PASTE_LEN = 8 * 1024 * 1024
_MAX_LINES = 10
_MAX_LEN = 2000
_FIRST, _LAST = 0x100000, 0x10FFFD
_PLACES = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")


class Pastes:
    """The long texts of one editor."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def fold(self, text: str) -> str:
        """`text` as it is when it is short, else the character that stands for it.

        Raises `UsageError` when it is too long.
        """
        if len(text) > MAX_PASTE_LEN:
            raise UsageError(
                f"{len(text):,} characters are pasted, the limit is {MAX_PASTE_LEN:,}; "
                "/attach takes files"
            )
        text = _PLACES.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
        is_short = len(text) <= _MAX_LEN and text.count("\n") < _MAX_LINES
        if is_short or len(self._texts) > _LAST - _FIRST:
            return text
        self._texts.append(text)
        return chr(_FIRST + len(self._texts) - 1)

    def unfold(self, line: str) -> str:
        """`line` with all that is folded in it."""
        return _PLACES.sub(lambda match: self._text(match[0]) or "", line)

    def label(self, char: str) -> str | None:
        """What is shown for `char`; None when it stands for nothing but itself."""
        text = self._text(char)
        if text is None:
            return None
        num_lines = text.count("\n") + (not text.endswith("\n"))
        if num_lines < _MAX_LINES:
            return f"[pasted {len(text):,} characters]"
        return f"[pasted {num_lines:,} lines]"

    def _text(self, char: str) -> str | None:
        index = ord(char) - _FIRST
        return self._texts[index] if 0 <= index < len(self._texts) else None
