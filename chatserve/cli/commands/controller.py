"""`chatserve controller`: the public API over workers that register."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run it until a signal comes. Returns the exit code."""
    from chatserve.server import controller

    return controller.main(argv)
