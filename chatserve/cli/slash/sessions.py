"""Commands on the chats that are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatserve.cli.escapes import one_line
from chatserve.errors import UsageError

if TYPE_CHECKING:
    from chatserve.cli.chat import Chat, Kept

MOST_SHOWN = 4  # turns of a chat that is gone on with
_DEEDS = ("list", "search", "resume", "delete")


def _name(chat: Chat, name: str) -> None:
    if chat.kept is None:
        chat.display.error("this chat is not kept (--no-save)")
    elif not name:
        chat.display.note(f"this chat is called {chat.kept.name or 'nothing yet'}")
    elif (hindrance := chat.kept.rename(name)) is not None:
        chat.display.error(hindrance)
    else:
        chat.display.note(f"--resume {one_line(name)} goes on with this chat")


def _sessions(chat: Chat, argument: str) -> None:
    if chat.kept is None:
        chat.display.error("no chat is kept (--no-save)")
        return
    deed, _, wanted = argument.partition(" ")
    wanted = wanted.strip()
    if deed in ("", "list"):
        chat.display.note(chat.kept.listed())
    elif deed not in _DEEDS:
        chat.display.error(f"/sessions knows no {deed!r}; it knows {', '.join(_DEEDS)}")
    elif not wanted:
        what = "TEXT" if deed == "search" else "CHAT"
        chat.display.error(f"/sessions {deed} needs {what}")
    elif deed == "search":
        chat.display.note(chat.kept.searched(wanted))
    else:
        try:
            if deed == "resume":
                _resume(chat, chat.kept, wanted)
            else:
                chat.display.note(f"deleted {one_line(chat.kept.delete(wanted))}")
        except UsageError as error:
            chat.display.error(error.message)


def _resume(chat: Chat, kept: Kept, wanted: str) -> None:
    chat.save_turns()
    chat.transcript = kept.resume(wanted, "/sessions resume")
    chat.num_outside = 0
    chat.show_turns(MOST_SHOWN)


RUNS = {
    "name": _name,
    "sessions": _sessions,
}
