"""Commands that read and write files, and the clipboard."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from chatserve.cli import clipboard
from chatserve.cli.attachments import Attachment, find_files, is_file, read_attachment
from chatserve.cli.code_blocks import code_blocks
from chatserve.cli.escapes import one_line
from chatserve.cli.export import export
from chatserve.cli.transcript import Transcript
from chatserve.errors import UsageError

if TYPE_CHECKING:
    from chatserve.cli.chat import Chat


def _save(chat: Chat, file: str) -> None:
    if not file:
        chat.display.error("/save needs a file name")
        return
    try:
        if chat.server.progress() is None:
            template_name = chat.server.model().template_name
            chat.transcript.template_name = template_name or chat.transcript.template_name
        path, has_replaced = chat.transcript.save(file)
        chat.display.note(f"replaced {path}" if has_replaced else f"saved to {path}")
    except UsageError as error:
        chat.display.error(error.message)


def _load(chat: Chat, file: str) -> None:
    if not file:
        chat.display.error("/load needs a file name")
        return
    try:
        loaded = Transcript.load(file)
    except UsageError as error:
        chat.display.error(error.message)
        return
    chat.begin_anew()
    chat.transcript = loaded
    chat.show_turns()


def _export(chat: Chat, file: str) -> None:
    if not file:
        chat.display.error("/export needs a file name that ends in .md, .html or .json")
        return
    try:
        model = chat.server.model().name if chat.server.progress() is None else ""
        path, has_replaced = export(chat.transcript, file, model)
        chat.display.note(f"replaced {path}" if has_replaced else f"exported to {path}")
    except UsageError as error:
        chat.display.error(error.message)


def _attach(chat: Chat, argument: str) -> None:
    """Files of which one cannot be attached are all left aside."""
    if not argument or argument == "none":
        chat.waiting.files = [] if argument else chat.waiting.files
        waiting = ", ".join(each.name for each in chat.waiting.files) or "no file"
        chat.display.note(f"{waiting} goes with the next question")
        return
    try:
        words = [argument] if is_file(argument) else _words(argument)
        names = [name for word in words for name in find_files(word)]
        chat.waiting.check_number(len(names))
        files = [read_attachment(name) for name in names]
        chat.waiting.add(files)
    except UsageError as error:
        chat.display.error(error.message)
        return
    for each in files:
        size = _size(chat, each)
        chat.display.note(f"{one_line(each.name)} ({size}) goes with the next question")


def _words(argument: str) -> list[str]:
    try:
        return shlex.split(argument)
    except ValueError as error:
        raise UsageError(f"/attach: {argument!r} cannot be read: {error}") from error


def _size(chat: Chat, attachment: Attachment) -> str:
    size = f"{attachment.num_bytes:,} bytes"
    num_tokens = chat.server.count_tokens(attachment.fenced())
    if num_tokens is None:
        return size
    room = chat.server.model().context_length
    over = f", the context has {room:,}" if room is not None and num_tokens > room else ""
    return f"{size}, {num_tokens:,} tokens{over}"


def _copy(chat: Chat, argument: str) -> None:
    try:
        what, text = _wanted(chat, argument)
        by = chat.display.copy(text) if chat.copies_by_terminal else clipboard.copy(text)
        chat.display.note(f"copied {what} ({len(text):,} characters) by {by}")
    except UsageError as error:
        chat.display.error(error.message)


def _wanted(chat: Chat, argument: str) -> tuple[str, str]:
    """What `/copy` means, in words and as text. Raises `UsageError` where that is nothing."""
    turns = chat.transcript.turns[chat.transcript.offset :]
    answers = [turn.content for turn in turns if turn.role == "assistant" and turn.content]
    if not answers:
        raise UsageError("there is no answer to copy")
    word, _, number = argument.partition(" ")
    if word == "code":
        blocks = code_blocks(answers[-1])
        if not blocks:
            raise UsageError("the last answer has no code block")
        return "the code", _numbered(blocks, number.strip(), "code block of the last answer")
    what = f"answer {word}" if word else "the last answer"
    return what, _numbered(answers, argument, "answer")


def _numbered(texts: list[str], number: str, what: str) -> str:
    """The text of that number, or the last."""
    if not number:
        return texts[-1]
    if not (number.isdecimal() and 1 <= int(number) <= len(texts)):
        raise UsageError(f"there is no {what} {number}; there are 1 to {len(texts)}")
    return texts[int(number) - 1]


RUNS = {
    "save": _save,
    "load": _load,
    "export": _export,
    "attach": _attach,
    "copy": _copy,
}
