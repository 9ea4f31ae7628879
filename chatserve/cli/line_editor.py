"""Lines from a person: editing, history and the status line, by prompt_toolkit.

Knows the screen below the prompt; keys are in `chatserve.cli.editor_keys`, and what a line means
is up to others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import Completer
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.formatted_text.utils import fragment_list_len
from prompt_toolkit.history import History
from prompt_toolkit.input import Input
from prompt_toolkit.layout.processors import Processor, Transformation, TransformationInput
from prompt_toolkit.layout.utils import explode_text_fragments
from prompt_toolkit.output import Output
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.styles import Style

from chatserve.cli.editor_keys import key_bindings
from chatserve.cli.pastes import Pastes
from chatserve.errors import ChatserveError

STATUS_POLL_S = 0.1
PROMPT = "> "
MAX_KEPT_LEN = 64 * 1024
_NUM_MENU_ROWS = 8


class LineEditor:
    """Reads lines from the terminal.

    `status` is asked for what fits into so many columns below the prompt, again and again; when
    it raises, reading ends with what it raised.
    """

    def __init__(
        self,
        status: Callable[[int], str],
        history: History,
        completer: Completer,
        styles: Mapping[str, str],
        *,
        is_multiline: bool = False,
        has_mouse: bool = False,
        source: Input | None = None,
        screen: Output | None = None,
    ) -> None:
        """`styles`: in prompt_toolkit's words, by class."""
        self._status = status
        self._shown_status = ""
        self._notice = ""
        self._pastes = Pastes()
        is_command = Condition(_is_command)
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=lambda width, _line, _wraps: "." * (width - 1) + " ",
            key_bindings=key_bindings(
                completer, self._pastes, self._tell, is_multiline=is_multiline
            ),
            history=_FoldedHistory(history, self._pastes),
            auto_suggest=AutoSuggestFromHistory(),
            # arrows look for lines that begin as this one does
            enable_history_search=~is_command,
            search_ignore_case=True,
            completer=completer,
            complete_style=CompleteStyle.COLUMN,
            complete_while_typing=is_command,
            complete_in_thread=True,
            reserve_space_for_menu=_NUM_MENU_ROWS,
            input_processors=[_FoldedPastes(self._pastes)],
            bottom_toolbar=lambda: self.below,
            mouse_support=has_mouse,
            style=Style.from_dict(dict(styles)),
            input=source,
            output=screen,
        )

    def read(self, prefill: str = "") -> str:
        """The next line, or lines, edited from `prefill`.

        Raises `EOFError`, `KeyboardInterrupt` or what `status` did.
        """
        self._notice = ""
        self._shown_status = self._status(self._session.output.get_size().columns)
        line = self._session.prompt(default=self._pastes.fold(prefill), pre_run=self._follow_status)
        return self._pastes.unfold(line)

    @property
    def below(self) -> str:
        """What stands below the prompt."""
        return self._notice or self._shown_status

    @property
    def history(self) -> History:
        return self._session.history

    def _tell(self, notice: str) -> None:
        self._notice = notice

    def _follow_status(self) -> None:
        app = get_app()
        app.current_buffer.on_text_changed += lambda _: self._tell("")
        app.create_background_task(self._poll_status())

    async def _poll_status(self) -> None:
        app = get_app()
        while True:
            try:
                status = self._status(app.output.get_size().columns)
            except ChatserveError as error:
                app.exit(exception=error)
                return
            if status != self._shown_status:
                self._shown_status = status
                app.invalidate()
            await asyncio.sleep(STATUS_POLL_S)


def _is_command() -> bool:
    text = get_app().current_buffer.text
    return text.startswith(("/", "!!")) and "\n" not in text


class _FoldedHistory(History):
    """Another history whose long lines are folded; what is longer still is not kept."""

    def __init__(self, history: History, pastes: Pastes) -> None:
        super().__init__()
        self._history = history
        self._pastes = pastes

    def load_history_strings(self) -> Iterable[str]:
        return map(self._pastes.fold, self._history.load_history_strings())

    def store_string(self, string: str) -> None:
        line = self._pastes.unfold(string)
        if len(line) <= MAX_KEPT_LEN:
            self._history.store_string(line)


class _FoldedPastes(Processor):
    """Shows a label for each character that stands for a paste."""

    def __init__(self, pastes: Pastes) -> None:
        self._pastes = pastes

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        shown: StyleAndTextTuples = []
        starts = []  # where each character is shown
        for fragment in explode_text_fragments(transformation_input.fragments):
            starts.append(fragment_list_len(shown))
            label = self._pastes.label(fragment[1])
            shown.append(fragment if label is None else ("class:paste", label))
        starts.append(fragment_list_len(shown))

        def to_display(place: int) -> int:
            return starts[place] if place < len(starts) else starts[-1] + place - len(starts) + 1

        def to_source(place: int) -> int:
            return max(n for n, start in enumerate(starts) if start <= place)

        return Transformation(shown, to_display, to_source)
