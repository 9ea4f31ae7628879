"""Commands on who answers, and how."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from chatserve.cli.answer import ModelInfo
from chatserve.cli.escapes import one_line
from chatserve.cli.render import progress_text
from chatserve.cli.sampling_settings import DOCS, NAMES, changed, value_text
from chatserve.cli.stats import stats_text
from chatserve.errors import ChatserveError, UsageError

if TYPE_CHECKING:
    from chatserve.cli.chat import Chat

_CLIPBOARDS = ("auto", "terminal")
_CLIPBOARD_DOC = "/copy by a program of this system (auto), or by the terminal (OSC 52)"


def served_models(chat: Chat) -> dict[str, ModelInfo] | None:
    """All models by name; None when nobody can say, which has been told."""
    if (progress := chat.server.progress()) is not None:
        chat.display.error(progress_text(progress))
        return None
    try:
        return {model.name: model for model in chat.server.models()}
    except ChatserveError as error:
        chat.display.error(error.message)
        return None


def _model(chat: Chat, name: str) -> None:
    models = served_models(chat)
    if models is None:
        return
    there = ", ".join(one_line(each) for each in models)
    if not name:
        chat.display.note(f"{one_line(chat.server.model().name)} answers; there is {there}")
    elif name in models:
        chat.server.choose(models[name])
        chat.display.note(f"{one_line(name)} answers from now on")
    else:
        chat.display.error(f"{one_line(name)} is not served; there is {there}")


def _set(chat: Chat, argument: str) -> None:
    name, _, text = argument.partition(" ")
    text = text.strip()
    if name not in ("", "clipboard", *NAMES):
        there = ", ".join((*NAMES, "clipboard"))
        chat.display.error(f"there is no setting {name!r}; there are {there}")
    elif not text:
        chat.display.note(_table(chat, name))
    elif name == "clipboard":
        _set_clipboard(chat, text)
    else:
        try:
            sampling = changed(chat.options.sampling, chat.first_options.sampling, name, text)
        except UsageError as error:
            chat.display.error(error.message)
            return
        chat.options = replace(chat.options, sampling=sampling)
        chat.display.note(f"{name} is {value_text(sampling, name)}")


def _set_clipboard(chat: Chat, text: str) -> None:
    if text not in (*_CLIPBOARDS, "default"):
        chat.display.error(f"/set clipboard: {text!r} is not one of {', '.join(_CLIPBOARDS)}")
        return
    chat.copies_by_terminal = text == "terminal"
    chat.display.note(f"clipboard is {_clipboard(chat)}")


def _clipboard(chat: Chat) -> str:
    return "terminal" if chat.copies_by_terminal else "auto"


def _table(chat: Chat, only: str) -> str:
    rows = [(name, value_text(chat.options.sampling, name), DOCS[name]) for name in NAMES]
    rows.append(("clipboard", _clipboard(chat), _CLIPBOARD_DOC))
    shown = [row for row in rows if only in ("", row[0])]
    left = [f"{name} {value}" for name, value, _ in shown]
    width = max(map(len, left))
    return "\n".join(f"{each:<{width}}  {row[2]}" for each, row in zip(left, shown, strict=True))


def _stats(chat: Chat, _: str) -> None:
    is_ready = chat.server.progress() is None
    chat.display.note(stats_text(chat.stats, chat.server.model() if is_ready else None))


RUNS = {
    "model": _model,
    "set": _set,
    "stats": _stats,
}
