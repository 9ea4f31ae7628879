"""Somebody who chats at a terminal: their screen, their line editor, and what is kept.

Puts the parts of the terminal client together for one person; starts no server.
"""

from __future__ import annotations

import shlex
import sys
from functools import partial
from typing import TYPE_CHECKING

from chatserve import environment
from chatserve.cli.asking import Server
from chatserve.cli.chat import Chat
from chatserve.cli.render import Display
from chatserve.cli.request_settings import files_of, options_of, transcript_of
from chatserve.cli.screens import chosen_theme, person_display
from chatserve.cli.terminal import keys_unseen
from chatserve.config import ChatConfig
from chatserve.errors import ChatserveError, StartupError

if TYPE_CHECKING:
    from chatserve.cli.kept_chat import KeptChat
    from chatserve.cli.line_editor import LineEditor

CHAT_TEMPERATURE = 0.7
HISTORY_FILE = "lines.jsonl"
MOST_SHOWN = 4  # turns of a chat that is gone on with


class Person:
    """Somebody at a terminal, with what is kept of their chats."""

    def __init__(self, config: ChatConfig) -> None:
        """Raises `UsageError` when the chat to go on with is not there."""
        from chatserve.cli.kept_chat import KeptChat
        from chatserve.cli.session_store import SessionStore

        self._config = config
        self._files = files_of(config)
        self._display = person_display(config)
        self._transcript = transcript_of(config)
        self._kept: KeptChat | None = None
        if not config.no_save or config.resume is not None:
            kept = KeptChat(SessionStore.of_user(), self._display.note)
            if config.resume is not None:
                self._transcript = kept.resume(config.resume)
                self._transcript.system = config.conv_system_msg or self._transcript.system
            self._kept = None if config.no_save else kept

    def tell(self, text: str) -> None:
        self._display.note(text)

    def chat(self, server: Server) -> None:
        chat = Chat(
            server, self._display, self._transcript, options_of(self._config, CHAT_TEMPERATURE),
            kept=self._kept, hush=lambda: keys_unseen(sys.stdin, sys.stdout),
        )  # fmt: skip
        chat.waiting = self._files
        self._display.note("/help lists commands, Ctrl-D leaves")
        chat.show_turns(MOST_SHOWN)
        try:
            chat.run(line_editor(chat, self._display, self._config, self._kept))
        except StartupError:
            self._tell_name()
            raise
        self._tell_name()

    def _tell_name(self) -> None:
        if self._kept is not None and (name := self._kept.name) is not None:
            again = shlex.join(["chatserve", "chat", *_whom(self._config), "--resume", name])
            self._display.note(f"{again} goes on with this chat")


def _whom(config: ChatConfig) -> list[str]:
    """The words of the command line that say who answers."""
    if config.base_url is None:
        return [] if config.model is None else [config.model]
    model = [] if config.model is None else ["--model", config.model]
    return ["--base-url", config.base_url, *model]


def line_editor(
    chat: Chat, display: Display, config: ChatConfig, kept: KeptChat | None = None
) -> LineEditor:
    # late: prompt_toolkit takes a seventh of a second to import, and only people need it
    from prompt_toolkit.history import History, InMemoryHistory

    from chatserve.cli.completion import ChatCompleter, FreshNames
    from chatserve.cli.history import HistoryFile
    from chatserve.cli.line_editor import LineEditor

    history: History = InMemoryHistory()
    if not config.no_save:
        history = HistoryFile(environment.home() / HISTORY_FILE, display.note)
    sessions = partial(_session_names, kept)
    return LineEditor(
        chat.status,
        history,
        ChatCompleter(FreshNames(partial(_model_names, chat.server)), sessions),
        chosen_theme(config).editor,
        is_multiline=config.multiline,
        has_mouse=config.mouse,
    )


def _model_names(server: Server) -> list[str]:
    """In a thread: all models, or none where the server cannot say now."""
    try:
        return [model.name for model in server.models()] if server.progress() is None else []
    except ChatserveError:
        return []


def _session_names(kept: KeptChat | None) -> list[str]:
    return [] if kept is None else kept.names()
