"""What Tab completes: commands with their help, and what each of them takes.

Knows commands and names; the names of models and chats are asked for when they are needed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from chatserve.cli.escapes import one_line
from chatserve.cli.lines import COMMANDS
from chatserve.cli.sampling_settings import DEFAULT, DOCS, NAMES

FRESH_S = 10.0
WAIT_S = 0.3
_FILE_COMMANDS = ("save", "load", "export", "attach")
_DEEDS = {
    "list": "the newest kept chats",
    "search": "chats in which all of the words were said",
    "resume": "go on with a kept chat",
    "delete": "delete a kept chat",
}
_VALUES = {"context": ("refuse", "rolling"), "clipboard": ("auto", "terminal")}


def no_names() -> Sequence[str]:
    return ()


class FreshNames:
    """Names that somebody else knows, who may be slow: asked in a thread, and not too often."""

    def __init__(self, ask: Callable[[], Sequence[str]]) -> None:
        self._ask = ask
        self._names: Sequence[str] = ()
        self._asked_at: float | None = None
        self._has_come = threading.Event()

    def __call__(self) -> Sequence[str]:
        """What is known after at most `WAIT_S`."""
        now = time.monotonic()
        if self._asked_at is None or now - self._asked_at > FRESH_S:
            self._asked_at = now
            self._has_come.clear()
            threading.Thread(target=self._run, name="names", daemon=True).start()
        self._has_come.wait(WAIT_S)
        return self._names

    def _run(self) -> None:
        self._names = [name for name in self._ask() if name == one_line(name)]
        self._has_come.set()


class ChatCompleter(Completer):
    """Completes what is typed after `/` or `!!`."""

    def __init__(
        self,
        models: Callable[[], Sequence[str]] = no_names,
        sessions: Callable[[], Sequence[str]] = no_names,
    ) -> None:
        self._models = models
        self._sessions = sessions
        self._paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterator[Completion]:
        text = document.text_before_cursor
        prefix = next((each for each in ("/", "!!") if text.startswith(each)), None)
        if prefix is None or "\n" in text:
            return
        command, blank, argument = text.removeprefix(prefix).partition(" ")
        if not blank:
            yield from _commands(prefix, command)
        elif command in _FILE_COMMANDS:
            name = argument.rpartition(" ")[2] if command == "attach" else argument
            yield from self._paths.get_completions(Document(name), complete_event)
        else:
            *before, word = argument.split(" ")
            for name, does in self._arguments(command, before):
                if name.startswith(word):
                    yield Completion(name, -len(word), display_meta=does)

    def _arguments(self, command: str, before: list[str]) -> Iterator[tuple[str, str]]:
        """What may follow the words `before`, and what that does."""
        if command == "model" and not before:
            yield from ((name, "") for name in self._models())
        elif command == "compare" and len(before) < 2:
            yield from ((name, "") for name in self._models())
            if not before:
                yield "off", "one model answers again"
        elif command == "set" and not before:
            yield from ((name, DOCS[name]) for name in NAMES)
            yield "clipboard", "by whom /copy copies"
        elif command == "set" and len(before) == 1:
            yield from ((value, "") for value in (*_VALUES.get(before[0], ()), DEFAULT))
        elif command == "sessions" and not before:
            yield from _DEEDS.items()
        elif command == "sessions" and before in (["resume"], ["delete"]):
            yield from ((name, "") for name in self._sessions())
        elif command == "copy" and not before:
            yield "code", "only the code of the last answer"


def _commands(prefix: str, typed: str) -> Iterator[Completion]:
    for entry in sorted(COMMANDS, key=lambda entry: entry.name):
        for name in (entry.name, *entry.aliases):
            # an alias is offered only to whoever begins to type it
            if name.startswith(typed) and (name == entry.name or typed):
                shown = f"{prefix}{name} {entry.usage}".rstrip()
                yield Completion(
                    prefix + name, -len(prefix + typed), display=shown, display_meta=entry.does
                )
