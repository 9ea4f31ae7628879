"""`chatserve completion SHELL`: the script by which a shell completes our commands and flags.

Made by shtab from the parsers themselves; once printed, the shell needs no Python to complete, but
for the names of kept chats.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from chatserve.catalogue import ALIASES, CHAINS
from chatserve.config import DEFAULT_WEIGHTS
from chatserve.errors import UsageError
from chatserve.flags import CommandParser

SHELLS = ("bash", "zsh", "fish")
MODEL_NAMES = sorted({DEFAULT_WEIGHTS, *ALIASES, *CHAINS})
_NAMES = " ".join(MODEL_NAMES)
_WEIGHTS = {
    "bash": "_chatserve_model_file",
    "zsh": "_chatserve_model_file",
    "fish": f"(__fish_complete_path (commandline -ct); printf '%s\\\\n' {_NAMES})",
}
# only names that no shell could take for more than a word
_KEPT = "chatserve history --most 100 2>/dev/null | sed 's/  .*//' | grep -Ex '[[:alnum:]_.-]+'"
_CHATS = {
    "bash": "_chatserve_kept_chat",
    "zsh": "_chatserve_kept_chat",
    "fish": f"(printf '%s\\\\n' last; {_KEPT})",
}
_PREAMBLE = {
    "bash": f"""\
_chatserve_kept_chat() {{
  compgen -W "last $({_KEPT})" -- "$1"
}}
_chatserve_model_file() {{
  compgen -f -- "$1"
  compgen -W "{_NAMES}" -- "$1"
}}
""",
    "zsh": f"""\
_chatserve_kept_chat() {{
  _values chat last $({_KEPT})
}}
_chatserve_model_file() {{
  _alternative 'names:model:({_NAMES})' 'files:folder or .gguf file:_files'
}}
""",
}


@dataclass(frozen=True)
class CompletionConfig:
    """`chatserve completion` has no settings of its own."""


def main(argv: Sequence[str]) -> int:
    """Print the script of one shell. Raises `UsageError`."""
    parser = CommandParser(
        "chatserve completion",
        'Print the completion script of a shell. bash: eval "$(chatserve completion bash)" in '
        "~/.bashrc; zsh: chatserve completion zsh > a folder of $fpath/_chatserve; fish: "
        "chatserve completion fish > ~/.config/fish/completions/chatserve.fish",
        CompletionConfig,
    )
    parser.add_argument("shell", metavar="SHELL", help=f"one of {', '.join(SHELLS)}")
    shell = parser.flags(argv)["shell"]
    if shell not in SHELLS:
        raise UsageError(f"{shell!r} is none of the shells {', '.join(SHELLS)}")
    print(script(shell))
    return 0


def script(shell: str) -> str:
    """What `shell` reads to complete `chatserve`."""
    import shtab

    return shtab.complete(_whole_parser(), shell=shell, preamble=_PREAMBLE.get(shell, ""))


def _whole_parser() -> argparse.ArgumentParser:
    """All commands below one parser."""
    from chatserve.cli.main import COMMANDS, parser_of

    whole = argparse.ArgumentParser("chatserve", description="Chat with local language models.")
    whole.add_argument("-V", "--version", action="store_true", help="print the version")
    commands = whole.add_subparsers()
    for name, entry in COMMANDS.items():
        parser = parser_of(name)
        for action in parser._actions:
            _add_hint(action)
        commands.add_parser(
            name, parents=[parser], add_help=False, help=entry.does, description=entry.does
        )
    return whole


def _add_hint(action: argparse.Action) -> None:
    """What values an argument takes that has no list of them."""
    import shtab

    kind = str(action.metavar or action.dest).upper().rpartition("=]")[2]
    if action.choices or (action.nargs == 0):
        return
    if (kind in ("WEIGHTS", "NAME") and not action.option_strings) or kind == "WEIGHTS":
        vars(action)["complete"] = _WEIGHTS
    elif kind == "CHAT":
        vars(action)["complete"] = _CHATS
    elif kind in ("FILE", "PATH"):
        vars(action)["complete"] = shtab.FILE
    elif kind == "FOLDER":
        vars(action)["complete"] = shtab.DIRECTORY
    elif action.dest == "shell":
        action.choices = SHELLS
