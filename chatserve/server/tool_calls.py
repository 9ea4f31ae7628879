"""From the text of an answer to the calls in it, as it comes. Knows no schema and no frame.

A grammar has held the answer to its form, so nothing is guessed: what is read here are the texts
that `ToolFormat` names, in their order.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Sequence

from chatserve.models.tool_format import ToolFormat
from chatserve.server.deltas import Delta, TextDelta, ToolCallDelta

_ID_SIGNS = string.ascii_letters + string.digits


def new_call_id(tool_format: ToolFormat) -> str:
    length, prefix = (9, "") if tool_format.short_ids else (24, "call_")
    return prefix + "".join(secrets.choice(_ID_SIGNS) for _ in range(length))


class ToolCallParser:
    """Reads one answer; see `chatserve.server.deltas.ReplyParser`."""

    def __init__(self, tool_format: ToolFormat, new_id: Callable[[], str] | None = None) -> None:
        self._format = tool_format
        self._new_id = new_id or (lambda: new_call_id(tool_format))
        self._rest = ""
        # in front of the rest: text, unless a marker follows
        self._blanks: list[str] = []
        self._deltas: list[Delta] = []
        self._step: Callable[[], bool] = (
            self._read_text if tool_format.follows_text else self._read_beginning
        )
        self._literal = ""
        self._after_literal = self._step
        self._num_calls = 0
        self._is_in_call = False
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    def feed(self, text: str) -> Sequence[Delta]:
        self._rest += text
        while self._step():
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self, *, is_cut: bool) -> Sequence[Delta]:
        is_text = self._step in (self._read_text, self._read_beginning)
        rest, self._rest = "".join(self._blanks) + self._rest, ""
        if is_text and is_cut:
            # more likely a call that had no room than a text that looks like its beginning
            rest = rest[: len(rest) - self._num_withheld(rest)]
        return [TextDelta(rest)] if is_text and rest else []

    @property
    def has_tool_calls(self) -> bool:
        return self._num_calls > 0 and not self._is_in_call

    # each reads what it can of the rest, and says whether another may go on

    def _read_text(self) -> bool:
        """Text up to the first marker, without the blanks between them."""
        text, marker, rest = self._rest.partition(self._format.marker)
        if marker:
            self._say_text(text)
            self._blanks.clear()
            self._rest = rest
            self._expect(self._format.before_name, self._read_name)
            return True
        num_said = len(text) - self._num_withheld(text)
        self._say_text(text[:num_said])
        self._rest = text[num_said:]
        return False

    def _say_text(self, text: str) -> None:
        """With the blanks before it, without those at its end."""
        said = text.rstrip()
        if said:
            self._say("".join(self._blanks) + said)
            self._blanks.clear()
        if blanks := text[len(said) :]:
            self._blanks.append(blanks)

    def _read_beginning(self) -> bool:
        """Whether the answer is text or calls."""
        # behind a special token some models write a space
        beginning = self._rest.removeprefix(" ")
        marker = self._format.marker
        if beginning.startswith(marker):
            self._rest = beginning[len(marker) :]
            self._expect(self._format.before_name, self._read_name)
            return True
        if not marker.startswith(beginning):
            self._step = self._read_only_text
            return True
        return False

    def _read_only_text(self) -> bool:
        self._say(self._rest)
        self._rest = ""
        return False

    def _read_literal(self) -> bool:
        if len(self._rest) < len(self._literal):
            return False
        self._rest = self._rest[len(self._literal) :]
        self._step = self._after_literal
        return True

    def _read_name(self) -> bool:
        name, quote, rest = self._rest.partition('"')
        if not quote:
            return False
        self._deltas.append(ToolCallDelta(self._num_calls, self._new_id(), name))
        self._num_calls += 1
        self._is_in_call, self._depth = True, 0
        self._rest = quote + rest
        self._expect(self._format.before_arguments, self._read_arguments)
        return True

    def _read_arguments(self) -> bool:
        """A JSON object, as it comes."""
        for place, sign in enumerate(self._rest):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_in_string:
                self._is_in_string = sign != '"'
                self._is_escaped = sign == "\\"
            elif sign == '"':
                self._is_in_string = True
            elif sign in "{[":
                self._depth += 1
            elif sign in "}]":
                self._depth -= 1
                if not self._depth:
                    self._argue(place + 1)
                    self._is_in_call = False
                    self._expect(self._format.after_call, self._read_next)
                    return True
        self._argue(len(self._rest))
        return False

    def _read_next(self) -> bool:
        """Another call, or nothing more."""
        between = self._format.between
        if not between or len(self._rest) < len(between):
            return False
        self._rest = self._rest[len(between) :]
        self._step = self._read_name
        return True

    def _expect(self, literal: str, step: Callable[[], bool]) -> None:
        self._literal, self._after_literal, self._step = literal, step, self._read_literal

    def _say(self, text: str) -> None:
        if text:
            self._deltas.append(TextDelta(text))

    def _argue(self, count: int) -> None:
        if count:
            arguments = self._rest[:count]
            self._deltas.append(ToolCallDelta(self._num_calls - 1, arguments=arguments))
        self._rest = self._rest[count:]

    def _num_withheld(self, text: str) -> int:
        """How much of the end of `text` may be the beginning of the marker."""
        marker = self._format.marker
        longest = min(len(text), len(marker) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)
