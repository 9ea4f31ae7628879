"""One thing that was looked at: how it stands, and the way out where it does not stand well.

Plain data; knows nothing of what is looked at, and no terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from chatserve.errors import ChatserveError

Status = Literal["ok", "warn", "fail"]
_ORDER: tuple[Status, ...] = ("ok", "warn", "fail")


@dataclass(frozen=True)
class Finding:
    """`facts` are the numbers and names behind `text`, for programs."""

    name: str
    status: Status
    text: str
    way_out: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def refused(name: str, status: Status, error: ChatserveError | OSError) -> Finding:
    """The finding for an error, whose message ends with the way out after its first semicolon."""
    message = error.message if isinstance(error, ChatserveError) else str(error)
    text, _, way_out = message.partition("; ")
    return Finding(name, status, text, way_out or None)


def worst(findings: Sequence[Finding]) -> Status:
    """The status of the whole."""
    return max((finding.status for finding in findings), key=_ORDER.index, default="ok")
