"""`chatserve config`: every setting, its value and where the value comes from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatserve import environment
from chatserve.config import COMMAND_CONFIGS, sources
from chatserve.errors import UsageError
from chatserve.flags import CommandParser
from chatserve.settings import fields_of, setting


@dataclass(frozen=True)
class ConfigConfig:
    """Settings of `chatserve config`."""

    json: bool = setting(False, "one JSON object: the file, and by command each value and source")


def main(argv: Sequence[str]) -> int:
    """Print the settings of all commands, or of one. Raises `UsageError`."""
    parser = CommandParser(
        "chatserve config",
        "Print every setting with its value and source: default, settings file or variable.",
        ConfigConfig,
    )
    commands = ", ".join(COMMAND_CONFIGS)
    parser.add_argument("command", nargs="?", help=f"only the settings of {commands}")
    flags = parser.flags(argv)
    chosen = flags["command"]
    if chosen is not None and chosen not in COMMAND_CONFIGS:
        raise UsageError(f"{chosen!r} has no settings; there are {commands}")
    file = environment.settings_file()
    settings = {
        command: _settings(config, file)
        for command, config in COMMAND_CONFIGS.items()
        if chosen in (None, command)
    }
    if flags.get("json"):
        print(json.dumps({"file": None if file is None else str(file)} | _described(settings)))
        return 0
    print(f"# settings file: {file or 'none'}")
    for command, values in settings.items():
        print(f"\n[{command}]")
        print(_table(values))
    return 0


def _settings(config: type[Any], file: Path | None) -> dict[str, tuple[Any, str]]:
    # settings without a flag pass between our own processes
    shown = {item.name for item in fields_of(config) if item.metadata["flag"]}
    values = sources(config, {}, file=file)
    return {name: value for name, value in values.items() if name in shown}


def _described(settings: dict[str, dict[str, tuple[Any, str]]]) -> dict[str, Any]:
    return {
        command: {
            name: {"value": value, "source": source} for name, (value, source) in rows.items()
        }
        for command, rows in settings.items()
    }


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
