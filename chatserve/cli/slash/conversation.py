"""Commands on the turns of a chat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatserve.cli.lines import help_text

if TYPE_CHECKING:
    from chatserve.cli.chat import Chat


def _help(chat: Chat, _: str) -> None:
    chat.display.note(help_text())


def _reset(chat: Chat, _: str) -> None:
    chat.begin_anew()
    chat.transcript.reset()
    chat.display.note("the conversation is empty")


def _remove(chat: Chat, _: str) -> None:
    has_removed = chat.transcript.remove_last()
    chat.save_turns()
    chat.display.note("removed the last question" if has_removed else "nothing to remove")


def _regen(chat: Chat, _: str) -> None:
    question = chat.transcript.take_last_question()
    if question is None:
        chat.display.note("no question to ask again")
    else:
        chat.ask(question)


def _system(chat: Chat, text: str) -> None:
    if text:
        chat.transcript.system = text
    chat.display.note(f"system message: {chat.transcript.system or 'none'}")


RUNS = {
    "help": _help,
    "reset": _reset,
    "remove": _remove,
    "regen": _regen,
    "system": _system,
}
