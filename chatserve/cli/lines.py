"""What a typed line means: a question or a command; and lines that a program types.

Knows text only: no line editor, no server.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TextIO

END_OF_MESSAGE = " __END_OF_A_MESSAGE_47582648__\n"
_BLOCK = '"""'


@dataclass(frozen=True)
class Command:
    """`/name argument` or FastChat's `!!name argument`."""

    name: str
    argument: str = ""


@dataclass(frozen=True)
class Question:
    text: str


@dataclass(frozen=True)
class CommandHelp:
    """One row of `/help`: the name that `Command` carries, its other spellings, what it does."""

    name: str
    usage: str
    does: str
    aliases: tuple[str, ...] = ()


COMMANDS = (
    CommandHelp("help", "", "show this list"),
    CommandHelp("exit", "", "leave, like Ctrl-D", ("quit",)),
    CommandHelp("reset", "", "start over with an empty conversation", ("clear",)),
    CommandHelp("remove", "", "take the last question and its answer back", ("undo",)),
    CommandHelp("regen", "", "ask the last question again"),
    CommandHelp("continue", "", "go on with an answer that was cut"),
    CommandHelp("edit", "[N]", "change the last question, or number N, and ask that instead"),
    CommandHelp("edit!", "[N]", "the same in your own editor (VISUAL, EDITOR)"),
    CommandHelp("history", "", "show the conversation, and what of it is out of the context"),
    CommandHelp("model", "[NAME]", "let another model or adapter answer; without NAME: list them"),
    CommandHelp("compare", "[MODEL …]", "let two models answer and choose; off ends it"),
    CommandHelp("system", "[TEXT]", "set the system message; without TEXT: show it"),
    CommandHelp("set", "[NAME VALUE]", "change how answers are sampled; without NAME: list all"),
    CommandHelp("stats", "", "tokens, times, and how full the context is"),
    CommandHelp("attach", "[FILE …]", "text files for the next question; none takes them back"),
    CommandHelp("copy", "[WHAT]", "copy the last answer; N: that number; code: only its code"),
    CommandHelp(
        "export", "FILE", "write Markdown (.md), a page (.html) or an OpenAI request (.json)"
    ),
    CommandHelp("save", "FILE", "write the conversation to FILE.json, as FastChat does"),
    CommandHelp("load", "FILE", "go on with a saved conversation"),
    CommandHelp("name", "[NAME]", "call this chat NAME, for --resume; without NAME: show it"),
    CommandHelp("sessions", "[DEED]", "kept chats; search TEXT, resume CHAT, delete CHAT"),
)
_NAMES = {name: entry.name for entry in COMMANDS for name in (entry.name, *entry.aliases)}


def parse(line: str, *, is_typed: bool = True) -> Command | Question | None:
    """What to do with a line: nothing when it is blank, else a command or a question.

    A leading space sends a line as it is, without that space, and so does a block in triple quotes.
    A program (`is_typed=False`) has only FastChat's `!!` commands. A `Command` whose name
    `COMMANDS` lacks was mistyped.
    """
    text = line.rstrip("\n")
    if not text.strip():
        return None
    if is_typed and text.startswith(_BLOCK):
        return Question(_unquote(text))
    for prefix in ("!!", "/") if is_typed else ("!!",):
        if text.startswith(prefix):
            name, _, argument = text.removeprefix(prefix).partition(" ")
            return Command(_NAMES.get(name.strip(), name.strip()), argument.strip())
        if text.startswith(" " + prefix):
            return Question(text[1:])
    return Question(text)


def is_open_block(text: str) -> bool:
    """Whether `text` began a block in triple quotes and has not ended it."""
    return text.startswith(_BLOCK) and not (len(text) >= 6 and text.rstrip().endswith(_BLOCK))


def spellings() -> list[str]:
    """All ways to write a command with a slash, for completion."""
    return ["/" + name for name in _NAMES]


def help_text() -> str:
    rows = [
        (
            " ".join([*("/" + n for n in (entry.name, *entry.aliases)), entry.usage]).strip(),
            entry.does,
        )
        for entry in COMMANDS
    ]
    width = max(len(usage) for usage, _ in rows)
    return "\n".join(
        [f"{usage:<{width}}  {does}" for usage, does in rows]
        + [
            "`!!` works like `/`; a leading space sends a line that begins with either.",
            '`"""` begins and ends a block of several lines; Esc+Enter adds a line, too.',
            "Ctrl-C stops an answer, Ctrl-D leaves.",
        ]
    )


def unknown_command_text(name: str) -> str:
    nearest = difflib.get_close_matches(name, _NAMES, n=1)
    hint = f" (did you mean /{nearest[0]}?)" if nearest else ""
    known = " ".join("/" + entry.name for entry in COMMANDS)
    return f"unknown command {name!r}{hint}; there are {known}; a leading space sends it as text"


class ProgramLines:
    """Messages that a program writes to standard input, each ended by `END_OF_MESSAGE`.

    FastChat's `--style programmatic`. Each message is echoed with its role, as FastChat does.
    """

    def __init__(self, source: TextIO, echo: TextIO, role: str) -> None:
        self._source = source
        self._echo = echo
        self._role = role

    def read(self, prefill: str = "") -> str:
        """The next message. Raises `EOFError` when the program has closed its end."""
        message = ""
        while not message.endswith(END_OF_MESSAGE):
            line = self._source.readline()
            if not line:
                raise EOFError
            message += line
        message = message.removesuffix(END_OF_MESSAGE)
        self._echo.write(f"[!OP:{self._role}]: {message}\n")
        self._echo.flush()
        return message


def _unquote(text: str) -> str:
    inner = text.removeprefix(_BLOCK)
    if inner.rstrip().endswith(_BLOCK):
        inner = inner.rstrip().removesuffix(_BLOCK)
    return inner.removeprefix("\n").removesuffix("\n")
