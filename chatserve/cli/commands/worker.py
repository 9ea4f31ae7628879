"""`chatserve worker`: one model behind the OpenAI API."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run it until a signal comes. Returns the exit code."""
    from chatserve.server import worker

    return worker.main(argv)
