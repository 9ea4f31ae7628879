"""What an answer says next, piece by piece: between a reply parser and the encoders of the APIs.

Plain data and one protocol. Without tools no delta is ever made: text goes straight to its frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the call number `index` of an answer.

    The first piece of a call has `call_id` and `name`, the others only more of the `arguments`.
    """

    index: int
    call_id: str | None = None
    name: str | None = None
    arguments: str = ""


Delta = TextDelta | ToolCallDelta


class ReplyParser(Protocol):
    """Reads the text of one choice as it comes. What may still become a call is withheld."""

    def feed(self, text: str) -> Sequence[Delta]: ...

    def finish(self, *, is_cut: bool) -> Sequence[Delta]:
        """What was withheld, when the text has ended; `is_cut`: for want of room."""
        ...

    @property
    def has_tool_calls(self) -> bool:
        """Whether there were calls and all are complete: the finish reason is `tool_calls` then,
        where it was `stop`."""
        ...
