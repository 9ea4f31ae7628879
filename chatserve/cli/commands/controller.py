"""`chatserve controller`: the public API over workers that register."""

from __future__ import annotations

from collections.abc import Sequence

from chatserve.server import command_line


def main(argv: Sequence[str]) -> int:
    """Run it until a signal comes. Returns the exit code."""
    return command_line.controller(argv)
