"""What keys do in the line editor, beside what prompt_toolkit's Emacs mode lets them do.

Knows the editor's buffer; not what a line means, except where it ends.
"""

from __future__ import annotations

from collections.abc import Callable

from prompt_toolkit.application import get_app, run_in_terminal
from prompt_toolkit.completion import CompleteEvent, Completer, get_common_complete_suffix
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys

from chatserve.cli import external_editor
from chatserve.cli.lines import is_open_block
from chatserve.cli.pastes import Pastes
from chatserve.errors import UsageError


def key_bindings(
    completer: Completer, pastes: Pastes, tell: Callable[[str], None], *, is_multiline: bool
) -> KeyBindings:
    """Enter sends, Esc+Enter adds a line; `is_multiline` swaps them. Ctrl-C puts the line aside,
    Tab completes, Ctrl-X Ctrl-E opens the user's editor, a long paste is folded.

    `tell` gets what goes wrong.
    """
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

    @bindings.add(Keys.BracketedPaste, filter=is_typing)
    def _(event: KeyPressEvent) -> None:
        try:
            event.current_buffer.insert_text(pastes.fold(event.data))
        except UsageError as error:
            tell(error.message)

    @bindings.add("tab", filter=is_typing)
    def _(event: KeyPressEvent) -> None:
        _complete(event, completer)

    @bindings.add("c-x", "c-e", filter=is_typing)
    def _(event: KeyPressEvent) -> None:
        _edit(event, pastes, tell)

    return bindings


def _complete(event: KeyPressEvent, completer: Completer) -> None:
    """At once, not in the background: Enter may come right behind Tab."""
    buffer = event.current_buffer
    if buffer.complete_state:
        buffer.complete_next()
        return
    document = buffer.document
    found = list(completer.get_completions(document, CompleteEvent(completion_requested=True)))
    if len(found) == 1:
        buffer.apply_completion(found[0])
    elif found:
        if common := get_common_complete_suffix(document, found):
            buffer.insert_text(common)
        buffer.start_completion()


def _edit(event: KeyPressEvent, pastes: Pastes, tell: Callable[[str], None]) -> None:
    buffer = event.current_buffer

    def edit() -> None:
        try:
            buffer.document = Document(
                pastes.fold(external_editor.edited(pastes.unfold(buffer.text)))
            )
        except UsageError as error:
            tell(error.message)

    run_in_terminal(edit)
