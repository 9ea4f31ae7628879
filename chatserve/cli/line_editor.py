"""Lines from a person: editing, history, completion and the status line, by prompt_toolkit.

Knows keys and the screen below the prompt; not what a line means, except where it ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.history import History
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.styles import Style

from chatserve.cli.lines import is_open_block
from chatserve.errors import ChatserveError

STATUS_POLL_S = 0.1
PROMPT = "> "
_STYLE = Style.from_dict({"bottom-toolbar": "noreverse #888888", "bottom-toolbar.text": ""})


class LineEditor:
    """Reads lines from the terminal.

    `status` is shown below the prompt and asked again all the time; when it raises, reading ends
    with what it raised.
    """

    def __init__(
        self,
        status: Callable[[], str],
        history: History,
        commands: Sequence[str],
        *,
        is_multiline: bool = False,
        has_mouse: bool = False,
        source: Input | None = None,
        screen: Output | None = None,
    ) -> None:
        self._status = status
        self._shown_status = ""
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=lambda width, _line, _wraps: "." * (width - 1) + " ",
            key_bindings=_key_bindings(is_multiline),
            history=history,
            completer=_CommandCompleter(commands),
            complete_style=CompleteStyle.READLINE_LIKE,
            complete_while_typing=False,
            bottom_toolbar=lambda: self._shown_status,
            mouse_support=has_mouse,
            style=_STYLE,
            input=source,
            output=screen,
        )

    def read(self, prefill: str = "") -> str:
        """The next line, or lines, edited from `prefill`.

        Raises `EOFError`, `KeyboardInterrupt` or what `status` did.
        """
        self._shown_status = self._status()
        return self._session.prompt(default=prefill, pre_run=self._follow_status)

    def _follow_status(self) -> None:
        get_app().create_background_task(self._poll_status())

    async def _poll_status(self) -> None:
        app = get_app()
        while True:
            try:
                status = self._status()
            except ChatserveError as error:
                app.exit(exception=error)
                return
            if status != self._shown_status:
                self._shown_status = status
                app.invalidate()
            await asyncio.sleep(STATUS_POLL_S)


def _key_bindings(is_multiline: bool) -> KeyBindings:
    """Enter sends, Esc+Enter adds a line; `is_multiline` swaps them. Ctrl-C puts the line aside."""
    bindings = KeyBindings()
    is_typing = has_focus(DEFAULT_BUFFER)

    def add_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @Condition
    def is_open() -> bool:
        return is_open_block(get_app().current_buffer.text)

    bindings.add("enter", filter=is_typing)(add_line if is_multiline else send)
    bindings.add("escape", "enter", filter=is_typing)(send if is_multiline else add_line)
    bindings.add("enter", filter=is_typing & is_open)(add_line)

    @bindings.add("c-c", filter=is_typing & Condition(lambda: bool(get_app().current_buffer.text)))
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.reset(append_to_history=True)

    return bindings


class _CommandCompleter(Completer):
    """Tab completes commands, and file names after those that take files."""

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = sorted(commands)
        self._paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        text = document.text_before_cursor
        command, space, argument = text.partition(" ")
        if not space:
            for name in self._commands if text else ():
                if name.startswith(text):
                    yield Completion(name, start_position=-len(text))
        elif command.lstrip("/!") in ("save", "load", "export", "attach"):
            yield from self._paths.get_completions(Document(argument), complete_event)
