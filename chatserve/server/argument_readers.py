"""From the text of a call's arguments to the JSON that clients get, as it comes.

A grammar has held the text to its form, so nothing is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Protocol

from chatserve.models.tool_format import ArgumentTags
from chatserve.server.tagged_arguments import NULL, Kind


class ArgumentReader(Protocol):
    """Reads the arguments of one call."""

    def read(self, text: str) -> tuple[str, str, bool]:
        """JSON to be told, what of `text` is to come again with more, and whether that was all."""
        ...


class JsonArguments:
    """A JSON object, told as it is."""

    def __init__(self) -> None:
        self._depth = 0
        self._strings = _Strings()

    def read(self, text: str) -> tuple[str, str, bool]:
        for place, sign in enumerate(text):
            if self._strings.holds(sign):
                continue
            if sign in "{[":
                self._depth += 1
            elif sign in "}]":
                self._depth -= 1
                if not self._depth:
                    return text[: place + 1], text[place + 1 :], True
        return text, "", False


class TaggedArguments:
    """One argument after the other between `tags`, of the `kinds` that their names have."""

    def __init__(self, tags: ArgumentTags, kinds: Mapping[str, Kind]) -> None:
        self._tags = tags
        self._kinds = kinds
        self._rest = ""
        self._told: list[str] = []
        self._num_read = 0
        self._strings = _Strings()
        self._is_done = False
        self._step: Callable[[], bool] = self._read_beginning

    def read(self, text: str) -> tuple[str, str, bool]:
        self._rest = text
        while self._step():
            pass
        told, self._told = "".join(self._told), []
        return told, self._rest, self._is_done

    # each reads what it can of the rest, and says whether another may go on

    def _read_beginning(self) -> bool:
        """Another argument, or the end of all."""
        before_key = self._tags.before_key
        if self._rest.startswith(before_key):
            self._rest = self._rest[len(before_key) :]
            self._step = self._read_key
            return True
        if not before_key.startswith(self._rest):
            self._told.append("}" if self._num_read else "{}")
            self._is_done = True
        return False

    def _read_key(self) -> bool:
        key, found, rest = self._rest.partition(self._tags.after_key)
        if not found:
            return False
        self._rest = rest
        self._told.append(f"{', ' if self._num_read else '{'}{_text(key)}: ")
        self._num_read += 1
        kind = self._kinds[key]
        if kind == "json":
            self._strings = _Strings()
            self._step = self._read_json
        elif kind == "text":
            self._begin_text()
        else:
            self._step = self._read_null
        return True

    def _read_null(self) -> bool:
        null = NULL + self._tags.after_value
        if self._rest.startswith(null):
            self._rest = self._rest[len(null) :]
            self._told.append(NULL)
            self._step = self._read_beginning
            return True
        if null.startswith(self._rest):
            return False
        self._begin_text()
        return True

    def _begin_text(self) -> None:
        self._told.append('"')
        self._step = self._read_text

    def _read_text(self) -> bool:
        end = self._tags.after_value
        text, found, rest = self._rest.partition(end)
        if found:
            self._told.append(_text(text)[1:])
            self._rest = rest
            self._step = self._read_beginning
            return True
        num_told = len(text) - num_withheld(text, end)
        self._told.append(_text(text[:num_told])[1:-1])
        self._rest = text[num_told:]
        return False

    def _read_json(self) -> bool:
        """A JSON value: what ends it cannot be a part of it, but in a string."""
        num_told = 0
        for place, sign in enumerate(self._rest):
            if self._strings.holds(sign):
                num_told = place + 1
            elif sign == "<":
                self._told.append(self._rest[:num_told])
                self._rest = self._rest[num_told:]
                self._step = self._read_end
                return True
            elif not sign.isspace():
                num_told = place + 1
        self._told.append(self._rest[:num_told])
        self._rest = self._rest[num_told:]
        return False

    def _read_end(self) -> bool:
        length = len(self._tags.after_value)
        if len(self._rest) < length:
            return False
        self._rest = self._rest[length:]
        self._step = self._read_beginning
        return True


class _Strings:
    """Which signs of a JSON text are inside of strings."""

    def __init__(self) -> None:
        self._is_inside = False
        self._is_escaped = False

    def holds(self, sign: str) -> bool:
        """Whether `sign`, the next one, is of a string, with its quotes."""
        if self._is_escaped:
            self._is_escaped = False
            return True
        if self._is_inside:
            self._is_inside = sign != '"'
            self._is_escaped = sign == "\\"
            return True
        self._is_inside = sign == '"'
        return self._is_inside


def num_withheld(text: str, literal: str) -> int:
    """How much of the end of `text` may be the beginning of `literal`."""
    longest = min(len(text), len(literal) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(literal[:n])), 0)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
