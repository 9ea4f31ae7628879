"""`chatserve config`: every setting, its value and where the value comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chatserve import environment
from chatserve.config import COMMAND_CONFIGS, sources
from chatserve.errors import UsageError
from chatserve.flags import CommandParser
from chatserve.settings import fields_of


@dataclass(frozen=True)
class ConfigConfig:
    """`chatserve config` has no settings of its own."""


def main(argv: Sequence[str]) -> int:
    """Print the settings of all commands, or of one. Raises `UsageError`."""
    parser = CommandParser(
        "chatserve config",
        "Print every setting with its value and source: default, settings file or variable.",
        ConfigConfig,
    )
    commands = ", ".join(COMMAND_CONFIGS)
    parser.add_argument("command", nargs="?", help=f"only the settings of {commands}")
    chosen = parser.flags(argv)["command"]
    if chosen is not None and chosen not in COMMAND_CONFIGS:
        raise UsageError(f"{chosen!r} has no settings; there are {commands}")
    file = environment.settings_file()
    print(f"# settings file: {file or 'none'}")
    for command, config in COMMAND_CONFIGS.items():
        if chosen in (None, command):
            print(f"\n[{command}]")
            # settings without a flag pass between our own processes
            shown = {item.name for item in fields_of(config) if item.metadata["flag"]}
            values = sources(config, {}, file=file)
            print(_table({name: value for name, value in values.items() if name in shown}))
    return 0


def _table(values: dict[str, tuple[Any, str]]) -> str:
    rows = [(name, _shown(value), source) for name, (value, source) in values.items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"{name:<{widths[0]}}  {value:<{widths[1]}}  # {source}" for name, value, source in rows
    )


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)
