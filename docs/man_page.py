"""chatserve.1, the manual page: from the parsers of all commands, in man(7)."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator

from chatserve import __version__
from chatserve.cli.main import COMMANDS, parser_of

HEAD = """\
.\\" Made by `make docs` from the parsers of all commands; do not edit.
.TH CHATSERVE 1 "" "chatserve {version}" "User Commands"
.SH NAME
chatserve \\- chat with local language models, and serve them over the OpenAI API
.SH SYNOPSIS
.B chatserve
.I COMMAND
.RI [ ARGUMENT " ...]"
.SH DESCRIPTION
Point it at the weights of a Llama-family chat model, chat in seconds, and serve it over an
OpenAI-compatible API.
.I WEIGHTS
is a Hugging Face folder, a .gguf file, an alias or a hub id; without it the embedded default model
answers. Each setting is a flag, a variable CHATSERVE_NAME and a key of one TOML file, in this
precedence;
.B chatserve config
shows each value and its source.
.SH COMMANDS
"""
TAIL = """\
.SH EXIT STATUS
.TP
.B 0
ok
.TP
.B 1
a request, the server or the hub failed, or a disk is full
.TP
.B 2
usage, unknown alias or template, public address without a key
.TP
.B 3
missing or bad model files
.TP
.B 4
does not fit in memory
.TP
.B 5
cannot bind
.TP
.B 6
registration refused
.TP
.B 7
a worker keeps crashing
.TP
.B 130
interrupted
.SH ENVIRONMENT
.TP
.B CHATSERVE_HOME
folder for models, chats and settings; default: the platform's folders of the user
.TP
.B CHATSERVE_CONFIG
the TOML file with settings
.TP
.BR CHATSERVE_API_KEY ", " CHATSERVE_API_KEYS
the key that a client sends; the keys that a server takes, comma-separated
.TP
.B NO_COLOR
no colours
.SH FILES
.TP
.I $XDG_CONFIG_HOME/chatserve/config.toml
settings
"""


def render() -> str:
    return HEAD.format(version=__version__) + "".join(map(_command, COMMANDS)) + TAIL


def _command(name: str) -> str:
    parser = parser_of(name)
    lines = [f".SS {_roff(parser.prog)}", _roff(parser.description or ""), *_usage(parser)]
    for group in parser._action_groups:
        shown = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        for action in shown:
            lines += [".TP", _names(action), _roff(action.help or "")]
    return "\n".join(lines) + "\n"


def _usage(parser: argparse.ArgumentParser) -> Iterator[str]:
    words = [str(a.metavar or a.dest).upper() for a in parser._get_positional_actions()]
    yield ".PP"
    yield f".B {_roff(' '.join([parser.prog, '[FLAG ...]', *words]))}"


def _names(action: argparse.Action) -> str:
    if not action.option_strings:
        return f".I {_roff(str(action.metavar or action.dest).upper())}"
    value = ""
    if action.nargs != 0:
        value = "{" + ",".join(action.choices) + "}" if action.choices else str(action.metavar)
    names = r"\fR, \fB".join(map(_roff, action.option_strings))
    return rf"\fB{names}\fR" + (rf" \fI{_roff(value)}\fR" if value else "")


def _roff(text: str) -> str:
    """Text that troff takes for text, on one line."""
    line = " ".join(inspect.cleandoc(text).split()).replace("\\", r"\e").replace("%%", "%")
    line = line.replace("…", "...").replace("-", r"\-").replace("'", r"\(aq")
    line = "".join(c if c.isascii() else f"\\[u{ord(c):04X}]" for c in line)
    return r"\&" + line if line.startswith(".") else line
