"""`chatserve controller` with a window."""

from __future__ import annotations

from chatserve.server import command_line
from tests.faults.planted import plant
from tests.faults.window import open_window

if __name__ == "__main__":
    plant()
    open_window()
    raise SystemExit(command_line.controller())
