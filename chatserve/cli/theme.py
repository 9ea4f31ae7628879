"""Colours: for a dark screen, for a light one, and such as can be read on both.

Knows names of styles; draws nothing and imports nothing that draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Theme:
    """code: how code is coloured, a name that `live_markdown` knows. markdown: rich's styles.
    editor: prompt_toolkit's.
    """

    code: str
    markdown: Mapping[str, str] = field(default_factory=dict)
    editor: Mapping[str, str] = field(default_factory=dict)
    has_color: bool = True


def theme_of(name: str, background: str | None) -> Theme:
    """The theme of that name; `auto` follows the background, `dark` or `light`, where that is
    known."""
    if name == "auto":
        name = background or name
    return _THEMES[name]


def _theme(code: str, accent: str, faint: str, suggestion: str, chosen: str) -> Theme:
    return Theme(
        code,
        # rich's own code style has a black background, a bar across a light terminal
        {"markdown.code": f"bold {accent}", "markdown.code_block": accent},
        {
            **_PLAIN,
            "bottom-toolbar": f"noreverse {faint}",
            "auto-suggestion": suggestion,
            "paste": f"bold ansi{accent}",
            "completion-menu.completion": "noreverse bg:default",
            "completion-menu.completion.current": chosen,
            "completion-menu.meta.completion": f"noreverse bg:default {faint}",
            "completion-menu.meta.completion.current": chosen,
        },
    )


_PLAIN = {
    "bottom-toolbar": "noreverse",
    "bottom-toolbar.text": "",
    "paste": "bold",
    "completion-menu": "bg:default",
    "completion-menu.completion": "bg:default",
    "completion-menu.completion.current": "reverse",
    "completion-menu.meta.completion": "bg:default",
    "completion-menu.meta.completion.current": "reverse",
    "scrollbar.background": "bg:default",
    "scrollbar.button": "reverse",
}
_THEMES = {
    "auto": _theme("neutral", "cyan", "#888888", "#888888", "reverse"),
    "dark": _theme("ansi_dark", "cyan", "#999999", "#777777", "bg:ansicyan ansiblack"),
    "light": _theme("ansi_light", "blue", "#666666", "#999999", "bg:ansiblue ansiwhite"),
    "none": Theme("neutral", {"markdown.code": "bold", "markdown.code_block": ""}, _PLAIN, False),
}
