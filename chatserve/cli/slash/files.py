"""Commands that read and write files."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


RUNS = {
    "save": _save,
    "load": _load,
}
