"""How a chat is drawn: the drawers that its settings, and the terminal, ask for.

Knows settings and the terminal of this process; no server, no conversation.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from chatserve import environment
from chatserve.cli.columns_drawer import ColumnsDrawer
from chatserve.cli.render import AnswerDrawer, Display, MarkdownDrawer, MarkdownPrinter, PlainDrawer
from chatserve.cli.terminal import columns_of
from chatserve.cli.theme import Theme, theme_of
from chatserve.cli.transcript import Transcript
from chatserve.config import ChatConfig


def person_display(config: ChatConfig) -> Display:
    """For somebody who sees one answer after the other, or two side by side."""
    return display_of(_person_drawer(config), config, ColumnsDrawer(sys.stdout, terminal_size))


def display_of(
    drawer: AnswerDrawer,
    config: ChatConfig,
    columns_drawer: ColumnsDrawer | None = None,
    take_thought: Callable[[str], None] | None = None,
) -> Display:
    is_terminal = sys.stderr.isatty() and environment.is_color_wanted()
    return Display(
        drawer, sys.stderr, is_raw=config.raw, is_terminal=is_terminal,
        has_free_line=config.style != "programmatic",
        columns=lambda: columns_of(sys.stderr), columns_drawer=columns_drawer,
        has_color=chosen_theme(config).has_color, take_thought=take_thought,
    )  # fmt: skip


def chosen_theme(config: ChatConfig) -> Theme:
    name = config.theme if environment.is_color_wanted() else "none"
    return theme_of(name, environment.terminal_background())


def script_drawer(config: ChatConfig) -> AnswerDrawer:
    if config.style == "programmatic":
        return PlainDrawer(sys.stdout, prefix=f"[!OP:{Transcript().roles[1]}]: ")
    if not is_rich(config):
        return PlainDrawer(sys.stdout, columns=_wrap_columns(config))
    if sys.stdout.isatty():
        return MarkdownDrawer(sys.stdout, terminal_size, theme=chosen_theme(config))
    return MarkdownPrinter(sys.stdout, terminal_size()[0], theme=chosen_theme(config))


def _person_drawer(config: ChatConfig) -> AnswerDrawer:
    if is_rich(config):
        return MarkdownDrawer(
            sys.stdout,
            terminal_size,
            theme=chosen_theme(config),
            blank_line_after=True,
        )
    return PlainDrawer(sys.stdout, blank_line_after=True, columns=_wrap_columns(config))


def _wrap_columns(config: ChatConfig) -> Callable[[], int | None]:
    """Where plain answers are wrapped: in a terminal, unless its cursor obeys the model."""
    return lambda: None if config.raw else columns_of(sys.stdout)


def is_rich(config: ChatConfig) -> bool:
    """Markdown is drawn where there is a terminal to draw on, unless colours are unwanted."""
    if config.style == "auto":
        return sys.stdout.isatty() and environment.is_color_wanted() and not config.raw
    return config.style == "rich"


def terminal_size() -> tuple[int, int]:
    try:
        return os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return 80, 24
