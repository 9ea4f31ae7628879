"""`chatserve COMMAND …`: the table of subcommands and the boundary of the process.

Imports a command only when it runs. Every failure ends here: one line on stderr and an exit code.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatserve import __version__
from chatserve.cli.escapes import one_line
from chatserve.cli.terminal import columns_of
from chatserve.cli.word_wrap import wrapped
from chatserve.errors import ChatserveError, StartupError, UsageError

if TYPE_CHECKING:
    import argparse

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class CommandEntry:
    """One row of the table: the module has `main(argv) -> int`."""

    module: str
    does: str


COMMANDS = {
    "chat": CommandEntry("chatserve.cli.commands.chat", "chat in the terminal, or answer once"),
    "serve": CommandEntry("chatserve.cli.commands.serve", "serve models over the OpenAI API"),
    "controller": CommandEntry("chatserve.cli.commands.controller", "only the API's front door"),
    "worker": CommandEntry("chatserve.cli.commands.worker", "only one model, for a controller"),
    "ps": CommandEntry("chatserve.cli.commands.ps", "list the models of running servers"),
    "load": CommandEntry("chatserve.cli.commands.load", "let a running server load a model"),
    "unload": CommandEntry("chatserve.cli.commands.unload", "let it give the memory back"),
    "pull": CommandEntry("chatserve.cli.commands.pull", "download a model"),
    "list": CommandEntry("chatserve.cli.commands.list", "list the downloaded models"),
    "plan": CommandEntry("chatserve.cli.commands.plan", "say whether a model fits into memory"),
    "top": CommandEntry("chatserve.cli.commands.top", "watch a running server in the terminal"),
    "history": CommandEntry("chatserve.cli.commands.history", "list, search, show kept chats"),
    "quality": CommandEntry("chatserve.cli.commands.quality", "measure what compression costs"),
    "apply-delta": CommandEntry(
        "chatserve.cli.commands.apply_delta", "add delta weights (Vicuna v0, v1.1) to their base"
    ),
    "merge-adapter": CommandEntry(
        "chatserve.cli.commands.merge_adapter", "merge LoRA adapters into their base"
    ),
    "repair": CommandEntry(
        "chatserve.cli.commands.repair", "find what a conversion spoilt, and put it right"
    ),
    "train": CommandEntry("chatserve.cli.commands.train", "teach a model from answers with votes"),
    "template": CommandEntry("chatserve.cli.commands.template", "show how prompts are rendered"),
    "replay": CommandEntry("chatserve.cli.commands.replay", "repeat a logged answer, and compare"),
    "doctor": CommandEntry("chatserve.cli.commands.doctor", "look at this machine and a model"),
    "config": CommandEntry("chatserve.cli.commands.config", "print all settings and their sources"),
    "completion": CommandEntry(
        "chatserve.cli.commands.completion", "print a script that lets a shell complete all this"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit code."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    try:
        code = _run(name, rest)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # whoever read our output has left; the interpreter must not try to flush the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # and has all that it wanted (`| head`): none of our exit codes is for that
        return 0
    except Exception as error:  # the boundary of the process: a bug, too, is one line
        if "--debug" in rest:
            traceback.print_exc()
        _print_error(error)
        return error.exit_code if isinstance(error, StartupError) else EXIT_FAILED


def parser_of(*command: str) -> argparse.ArgumentParser:
    """The parser of a command, with words of its own behind it if it has some; nothing runs."""
    from chatserve.flags import SHOW_PARSER, ParserShown

    name, *rest = command
    try:
        importlib.import_module(COMMANDS[name].module).main([*rest, SHOW_PARSER])
    except ParserShown as shown:
        return shown.parser
    raise AssertionError(f"{name} has read its flags otherwise than by CommandParser")


def _run(name: str, argv: list[str]) -> int:
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name in ("-V", "--version"):
        print(f"chatserve {__version__}")
        return 0
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}; there are {', '.join(COMMANDS)}")
    module = importlib.import_module(COMMANDS[name].module)
    code = module.main(argv)
    assert isinstance(code, int)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {entry.does}" for name, entry in COMMANDS.items()]
    return "\n".join(
        [
            "usage: chatserve COMMAND [ARGUMENT ...]",
            "",
            "Chat with local language models, and serve them over the OpenAI API.",
            "",
            *rows,
            "",
            "`chatserve COMMAND --help` lists a command's flags; --version prints the version.",
        ]
    )


def _print_error(error: Exception) -> None:
    if isinstance(error, ChatserveError):
        message = error.message
    elif isinstance(error, OSError):
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    else:
        kind = type(error).__name__
        message = f"internal error: {kind}: {error}; --debug shows where (please report it)"
    with contextlib.suppress(OSError):
        line = f"chatserve: {one_line(message)}"
        columns = columns_of(sys.stderr)
        print(line if columns is None else wrapped(line, columns), file=sys.stderr, flush=True)
