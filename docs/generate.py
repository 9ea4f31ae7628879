"""Writes docs/reference/commands.md from the real `--help` of every command; `--check` compares."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from chatserve.cli.main import COMMANDS

SUBCOMMANDS = {"template": ("check",)}
TARGET = Path(__file__).parent / "reference" / "commands.md"


def help_text(*command: str) -> str:
    environment = {**os.environ, "COLUMNS": "88", "NO_COLOR": "1", "PYTHON_COLORS": "0"}
    result = subprocess.run(
        [sys.executable, "-m", "chatserve", *command, "--help"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return result.stdout.rstrip()


def render() -> str:
    parts = [
        "# Commands\n\nMade by `make docs` from the programs' own `--help`; do not edit.\n",
        f"```text\n{help_text()}\n```\n",
    ]
    for name in COMMANDS:
        parts.append(f"## chatserve {name}\n\n```text\n{help_text(name)}\n```\n")
        for words in SUBCOMMANDS.get(name, ()):
            text = help_text(name, words)
            parts.append(f"## chatserve {name} {words}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def main() -> int:
    text = render()
    if "--check" not in sys.argv[1:]:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(text, "utf-8")
        return 0
    if not TARGET.exists() or TARGET.read_text("utf-8") != text:
        print(f"{TARGET.relative_to(Path.cwd())} is stale; run: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
