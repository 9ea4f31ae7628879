"""The status line: what it says where there is room, and what it leaves out where there is none."""

from __future__ import annotations

import pytest

from chatserve.cli.answer import Answer, ChatDelta, ModelInfo
from chatserve.cli.status_bar import bar_text, live_text
from chatserve.cli.theme import theme_of
from chatserve.config import ChatConfig
from chatserve.environment import is_color_wanted, terminal_background
from chatserve.settings import fields_of

MODEL = ModelInfo("smollm2", "cpu", "float32", 8, 2048)


def answer() -> Answer:
    done = Answer()
    for text, now in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        done.take(ChatDelta(text), now)
    done.take(ChatDelta("", "stop", 3, num_prompt_tokens=1200), 3.0)
    return done


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (80, "smollm2 · cpu · float32 · 8-bit · context 1,203/2,048 · 1.0 tokens/s"),
        (62, "smollm2 · cpu · float32 · 8-bit · 1,203/2,048 · 1.0 tokens/s"),
        (50, "smollm2 · cpu · 8-bit · 1,203/2,048 · 1.0 tokens/s"),
        (40, "smollm2 · 1,203/2,048 · 1.0 tokens/s"),
        (10, "smollm2 · 1,203/2,048"),
    ],
)
def test_the_bar_says_what_there_is_room_for(columns: int, text: str) -> None:
    assert bar_text(MODEL, answer(), columns) == text


def test_what_is_not_known_is_left_out() -> None:
    assert bar_text(ModelInfo("m"), Answer(), 80) == "m"


def test_speed_while_an_answer_comes_is_told_after_a_second() -> None:
    done = answer()
    assert live_text(MODEL, done, 1.5) == "smollm2 · Ctrl-C stops"
    assert live_text(MODEL, done, 2.5) == "smollm2 · about 2 tokens/s · Ctrl-C stops"


@pytest.mark.parametrize(
    ("value", "background"),
    [("15;0", "dark"), ("0;15", "light"), ("0;default;7", "light"), ("7;8", "dark"),
     ("", None), ("x;default", None)],
)  # fmt: skip
def test_the_background_is_what_the_terminal_says(
    value: str, background: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLORFGBG", value)
    assert terminal_background() == background
    assert theme_of("auto", background) is theme_of(background or "auto", None)


def test_every_theme_that_can_be_asked_for_is_there() -> None:
    (setting,) = (each for each in fields_of(ChatConfig) if each.name == "theme")
    themes = {name: theme_of(name, None) for name in setting.metadata["choices"]}
    assert [name for name, theme in themes.items() if not theme.has_color] == ["none"]


@pytest.mark.parametrize(
    ("name", "value", "is_wanted"),
    [("NO_COLOR", "1", False), ("NO_COLOR", "", True), ("CLICOLOR", "0", False),
     ("CLICOLOR", "1", True), ("TERM", "dumb", False)],
)  # fmt: skip
def test_who_wants_no_colour_gets_none(
    name: str, value: str, is_wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ("NO_COLOR", "CLICOLOR"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    assert is_color_wanted() is is_wanted
