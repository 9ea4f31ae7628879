"""`chatserve serve`: a controller and one supervised worker per WEIGHTS."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run it until a signal comes. Returns the exit code."""
    from chatserve.server import launch

    return launch.main(argv)
