"""One event of a stream that others pass on, looked at on its way."""

from __future__ import annotations

import re


class CaughtEvent:
    """The data of the first event that `pattern` begins. Its line of data may be cut anywhere."""

    def __init__(self, pattern: re.Pattern[bytes]) -> None:
        self._pattern = pattern
        self._parts: list[bytes] = []
        self._is_begun = False
        self._is_whole = False

    def feed(self, data: bytes) -> bytes | None:
        """What it is, once: when its end is there."""
        if self._is_whole:
            return None
        if not self._is_begun:
            if not (found := self._pattern.search(data)):
                return None
            self._is_begun = True
            data = data[found.end() :]
        line, newline, _ = data.partition(b"\n")
        self._parts.append(line)
        if not newline:
            return None
        self._is_whole = True
        event = b"".join(self._parts).rstrip(b"\r")
        self._parts.clear()
        return event.removeprefix(b"data:")
