"""Commands on the turns of a chat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatserve.cli import external_editor
from chatserve.cli.lines import help_text
from chatserve.cli.transcript import Transcript
from chatserve.errors import UsageError

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


def _continue(chat: Chat, _: str) -> None:
    turns = chat.transcript.turns[chat.transcript.offset :]
    if not turns or turns[-1].role != "assistant":
        chat.display.note("no answer to go on with")
    elif not turns[-1].content:
        chat.display.note("nothing of the answer has come; /regen asks again")
    else:
        chat.go_on()


def _edit(chat: Chat, number: str) -> None:
    place = _question_place(chat, number)
    if place is None:
        return
    if chat.lines is None or not chat.options.is_typed:
        chat.display.error("/edit needs a terminal")
        return
    before = chat.transcript.turns[place].content
    try:
        text = chat.lines.read(before)
    except (KeyboardInterrupt, EOFError):
        text = ""
    except UsageError:
        chat.display.error(
            f"the question has {len(before):,} characters, too many for the prompt; "
            "/edit! opens your own editor"
        )
        return
    _ask_instead(chat, place, text)


def _edit_outside(chat: Chat, number: str) -> None:
    place = _question_place(chat, number)
    if place is None:
        return
    if not chat.options.is_typed:
        chat.display.error("/edit! needs a terminal")
        return
    before = chat.transcript.turns[place].content
    try:
        text = external_editor.edited(before)
    except UsageError as error:
        chat.display.error(error.message)
        return
    _ask_instead(chat, place, "" if text == before else text)


def _question_place(chat: Chat, number: str) -> int | None:
    """Where the question of that number is, or the last; None when there is none: that is told."""
    places = chat.transcript.questions()
    if not places:
        chat.display.note("no question to edit")
    elif not number:
        return places[-1]
    elif number.isdecimal() and 1 <= int(number) <= len(places):
        return places[int(number) - 1]
    else:
        chat.display.error(f"there is no question {number}; /history numbers 1 to {len(places)}")
    return None


def _ask_instead(chat: Chat, place: int, text: str) -> None:
    """The chat goes on from before that question; with later ones it stays kept as it was."""
    if not text.strip():
        chat.display.note("nothing is changed")
        return
    if place != chat.transcript.questions()[-1]:
        name = chat.kept.name if chat.kept is not None else None
        chat.begin_anew()
        if name is not None:
            chat.display.note(f"the chat as it was is kept as {name}")
    old = chat.transcript
    chat.transcript = Transcript(
        old.system, old.turns[:place], old.roles, old.template_name, old.offset
    )
    chat.ask(text)


def _history(chat: Chat, _: str) -> None:
    if not chat.transcript.turns[chat.transcript.offset :]:
        chat.display.note("the conversation is empty")
    chat.show_turns(are_numbered=True)


def _system(chat: Chat, text: str) -> None:
    if text:
        chat.transcript.system = text
    chat.display.note(f"system message: {chat.transcript.system or 'none'}")


RUNS = {
    "help": _help,
    "reset": _reset,
    "remove": _remove,
    "regen": _regen,
    "continue": _continue,
    "edit": _edit,
    "edit!": _edit_outside,
    "history": _history,
    "system": _system,
}
