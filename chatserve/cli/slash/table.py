"""All commands of a chat but `/exit`, by the names that `lines.COMMANDS` gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from chatserve.cli.slash import compare, conversation, files, sessions, settings

if TYPE_CHECKING:
    from chatserve.cli.chat import Chat

RUNS: Mapping[str, Callable[[Chat, str], None]] = {
    **conversation.RUNS,
    **compare.RUNS,
    **files.RUNS,
    **sessions.RUNS,
    **settings.RUNS,
}
