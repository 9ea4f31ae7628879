"""Writes docs/reference: commands.md from the real `--help` of every command, api.md from the
OpenAPI document, the manual page from the parsers. `--check` compares."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import api_page
import man_page

from chatserve.cli.commands.train import STEPS
from chatserve.cli.main import COMMANDS

SUBCOMMANDS = {"template": ("check",), "train": tuple(STEPS)}
FOLDER = Path(__file__).parent / "reference"


def help_text(*command: str) -> str:
    environment = {**os.environ, "COLUMNS": "88", "NO_COLOR": "1", "PYTHON_COLORS": "0"}
    result = subprocess.run(
        [sys.executable, "-m", "chatserve", *command, "--help"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return result.stdout.rstrip()


def commands() -> str:
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


PAGES = {"commands.md": commands, "api.md": api_page.render, "chatserve.1": man_page.render}


def main() -> int:
    stale = []
    for name, render in PAGES.items():
        target, text = FOLDER / name, render()
        if "--check" not in sys.argv[1:]:
            FOLDER.mkdir(exist_ok=True)
            target.write_text(text, "utf-8")
        elif not target.exists() or target.read_text("utf-8") != text:
            stale.append(str(target.relative_to(Path.cwd())))
    if stale:
        print(f"stale: {', '.join(stale)}; run: make docs", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
