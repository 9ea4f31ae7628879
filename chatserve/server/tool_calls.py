"""From the text of an answer to the calls in it, as it comes. Knows no schema and no frame.

A grammar has held the answer to its form, so nothing is guessed: what is read here are the texts
that `ToolFormat` names, in their order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import MappingProxyType

from chatserve.models.tool_format import ToolFormat
from chatserve.server.argument_readers import (
    ArgumentReader,
    JsonArguments,
    TaggedArguments,
    num_withheld,
)
from chatserve.server.deltas import Delta, TextDelta, ToolCallDelta
from chatserve.server.tagged_arguments import Kinds

_NAME = re.compile(r"[A-Za-z0-9_-]*")


class ToolCallParser:
    """Reads one answer; see `chatserve.server.deltas.ReplyParser`. `new_id` of the next call."""

    def __init__(
        self,
        tool_format: ToolFormat,
        new_id: Callable[[], str],
        *,
        kinds: Kinds = MappingProxyType({}),
    ) -> None:
        self._format = tool_format
        self._kinds = kinds
        self._new_id = new_id
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
        self._arguments: ArgumentReader = JsonArguments()

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
            rest = rest[: len(rest) - num_withheld(rest, self._format.marker)]
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
        num_said = len(text) - num_withheld(text, self._format.marker)
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
        known = _NAME.match(self._rest)
        end = known.end() if known else 0
        if end == len(self._rest):
            return False
        name, self._rest = self._rest[:end], self._rest[end:]
        self._deltas.append(ToolCallDelta(self._num_calls, self._new_id(), name))
        self._num_calls += 1
        self._is_in_call = True
        tags = self._format.tags
        self._arguments = TaggedArguments(tags, self._kinds[name]) if tags else JsonArguments()
        self._expect(self._format.before_arguments, self._read_arguments)
        return True

    def _read_arguments(self) -> bool:
        told, self._rest, is_complete = self._arguments.read(self._rest)
        if told:
            self._deltas.append(ToolCallDelta(self._num_calls - 1, arguments=told))
        if is_complete:
            self._is_in_call = False
            self._expect(self._format.after_call, self._read_next)
        return is_complete

    def _read_next(self) -> bool:
        """Another call, or nothing more."""
        between = self._format.between
        if not between or not self._rest.startswith(between):
            return False
        self._rest = self._rest[len(between) :]
        self._step = self._read_name
        return True

    def _expect(self, literal: str, step: Callable[[], bool]) -> None:
        self._literal, self._after_literal, self._step = literal, step, self._read_literal

    def _say(self, text: str) -> None:
        if text:
            self._deltas.append(TextDelta(text))
