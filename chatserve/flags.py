"""Command lines: parsers whose mistakes are one line, and FastChat's flags that are refused.

Knows argparse and the settings classes; starts nothing and reads no environment.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from chatserve.errors import UsageError
from chatserve.settings import add_flags

_GPTQ = "GPTQ checkpoints are not supported; use the original weights with --load-8bit"
_AWQ = "AWQ checkpoints are not supported; use the original weights with --load-8bit"
_EXLLAMA = "ExLlama is not part of chatserve; use the original weights with --load-8bit"
_XFT = "xFasterTransformer is not part of chatserve; the CPU kernels are its own, see --load-8bit"
_KEYS = (
    "a secret on the command line is visible to every user of this machine; "
    "put keys into CHATSERVE_API_KEYS (a client's own key: CHATSERVE_API_KEY) or --api-key-file"
)
_CORS = "the origins of --allow-origin may use whatever the API has"

REFUSED_FLAGS = {
    "--gptq-ckpt": _GPTQ,
    "--gptq-wbits": _GPTQ,
    "--gptq-groupsize": _GPTQ,
    "--gptq-act-order": _GPTQ,
    "--awq-ckpt": _AWQ,
    "--awq-wbits": _AWQ,
    "--awq-groupsize": _AWQ,
    "--enable-exllama": _EXLLAMA,
    "--exllama-max-seq-len": _EXLLAMA,
    "--exllama-gpu-split": _EXLLAMA,
    "--exllama-cache-8bit": _EXLLAMA,
    "--enable-xft": _XFT,
    "--xft-max-seq-len": _XFT,
    "--xft-dtype": _XFT,
    "--judge-sent-end": "an answer ends exactly where the model ends it",
    "--trust_remote_code": "code that comes with weights is never run",
    "--trust-remote-code": "code that comes with weights is never run",
    "--api-keys": _KEYS,
    "--ssl": "give the files by --ssl-certfile and --ssl-keyfile",
    "--allowed-origins": "list exact origins by --allow-origin A,B; there is none for all",
    "--allowed-methods": _CORS,
    "--allowed-headers": _CORS,
    "--allow-credentials": "keys come in a header, never in a cookie; see --allow-origin",
    "--control-token": (
        "a secret on the command line is visible to every user of this machine; "
        "put the token into CHATSERVE_CONTROL_TOKEN"
    ),
}
"""FastChat's flags for things that chatserve lacks or does elsewhere, each with its reason."""


SHOW_PARSER = "--_parser"
"""A hidden flag of each command: its parser comes out, as `ParserShown`, and nothing runs."""


class ParserShown(Exception):
    """For those who write of a command's flags: pages, completions."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__(parser.prog)
        self.parser = parser


class CommandParser(argparse.ArgumentParser):
    """An argument parser for one settings class that raises instead of printing its usage.

    Abbreviated flags are understood, FastChat's unsupported ones refused by name.
    """

    def __init__(self, prog: str, description: str, config: type[Any]) -> None:
        super().__init__(prog=prog, description=description)
        add_flags(self, config)
        hidden: dict[str, Any] = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        for name, reason in REFUSED_FLAGS.items():
            self.add_argument(name, action=_Refused, nargs="?", const=reason, **hidden)
        self.add_argument(SHOW_PARSER, action=_Shown, nargs=0, **hidden)

    def let_agree(self, what: str, *dests: str) -> None:
        """Refuse a command line that gives arguments of `dests` more than one value.

        argparse alone lets the last of several spellings win in silence.
        """
        given: list[str] = []

        def agree(text: str) -> str:
            if given and given[0] != text:
                raise UsageError(f"{what} are given twice: {given[0]} and {text}")
            given.append(text)
            return text

        for action in self._actions:
            if action.dest in dests:
                action.type = agree

    def flags(self, argv: Sequence[str], *, intermixed: bool = False) -> dict[str, Any]:
        """The settings that `argv` names, by field; absent ones are left out.

        `intermixed`: flags may stand between the arguments of one list.
        Raises `UsageError` on a flag that is unknown, ambiguous, refused or lacks its value.
        """
        parse = self.parse_known_intermixed_args if intermixed else self.parse_known_args
        namespace, unknown = parse(argv)
        if unknown:
            raise UsageError(self._unknown(unknown[0]))
        return vars(namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` lists the flags")

    def _unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"unexpected argument {argument!r}; `{self.prog} --help` shows the usage"
        name = argument.partition("=")[0]
        known = [
            option
            for action in self._actions
            if action.help != argparse.SUPPRESS
            for option in action.option_strings
        ]
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        return f"unknown flag {name}; {hint}`{self.prog} --help` lists the flags"


class _Refused(argparse.Action):
    """Raises its reason; the value, which may be a secret, is never repeated."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        raise UsageError(f"{self.option_strings[0]} is not supported: {self.const}")


class _Shown(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        raise ParserShown(parser)
