"""How whoever moves many bytes tells how far it is. Knows no terminal, no network and no file."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""
