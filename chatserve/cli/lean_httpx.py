"""httpx without its own command line, which brings click, rich and pygments: half of its import.

Whoever is here waits for a first prompt or a first word.
"""

from __future__ import annotations

import sys

_COMMAND_LINE = "httpx._main"

if "httpx" not in sys.modules:
    # what stands for None there cannot be imported; httpx goes on without it
    sys.modules[_COMMAND_LINE] = None  # type: ignore[assignment]  # the documented way to say so
try:
    import httpx
finally:
    if sys.modules.get(_COMMAND_LINE, sys) is None:
        del sys.modules[_COMMAND_LINE]

__all__ = ["httpx"]
