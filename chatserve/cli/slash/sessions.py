"""Commands on the chats that are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatserve.cli.escapes import one_line

if TYPE_CHECKING:
    from chatserve.cli.chat import Chat


def _name(chat: Chat, name: str) -> None:
    if chat.kept is None:
        chat.display.error("this chat is not kept (--no-save)")
    elif not name:
        chat.display.note(f"this chat is called {chat.kept.name or 'nothing yet'}")
    elif (hindrance := chat.kept.rename(name)) is not None:
        chat.display.error(hindrance)
    else:
        chat.display.note(f"--resume {one_line(name)} goes on with this chat")


def _sessions(chat: Chat, _: str) -> None:
    if chat.kept is None:
        chat.display.error("no chat is kept (--no-save)")
    else:
        chat.display.note(chat.kept.listed())


RUNS = {
    "name": _name,
    "sessions": _sessions,
}
