"""Commands on who answers, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatserve.cli.escapes import one_line
from chatserve.cli.render import progress_text
from chatserve.errors import ChatserveError

if TYPE_CHECKING:
    from chatserve.cli.chat import Chat


def _model(chat: Chat, name: str) -> None:
    if (progress := chat.server.progress()) is not None:
        chat.display.error(progress_text(progress))
        return
    try:
        models = {model.name: model for model in chat.server.models()}
    except ChatserveError as error:
        chat.display.error(error.message)
        return
    there = ", ".join(one_line(each) for each in models)
    if not name:
        chat.display.note(f"{one_line(chat.server.model().name)} answers; there is {there}")
    elif name in models:
        chat.server.choose(models[name])
        chat.display.note(f"{one_line(name)} answers from now on")
    else:
        chat.display.error(f"{one_line(name)} is not served; there is {there}")


RUNS = {
    "model": _model,
}
