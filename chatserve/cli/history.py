"""The lines typed in earlier chats, for the editor's arrow keys: one JSON string a line.

Knows a file only. Losing history never disturbs a chat: `warn` is called once and the chat goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from prompt_toolkit.history import History

MAX_LINES = 2000
_MAX_FILE_BYTES = 4 * 1024 * 1024


class HistoryFile(History):
    """Keeps typed lines in `path` (0600, its folder 0700); several chats may append at once."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        super().__init__()
        self._path = path
        self._warn: Callable[[str], None] | None = warn

    def load_history_strings(self) -> Iterable[str]:
        """The last `MAX_LINES` lines, newest first; lines that a crash cut are skipped."""
        try:
            with self._path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _MAX_FILE_BYTES))
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            self._fail("read", error)
            return []
        entries = (_decode(line) for line in reversed(lines))
        return [entry for entry in entries if entry][:MAX_LINES]

    def store_string(self, string: str) -> None:
        line = json.dumps(string) + "\n"
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                # one write in append mode: two chats cannot tear each other's lines
                os.write(handle, line.encode())
            finally:
                os.close(handle)
        except OSError as error:
            self._fail("write", error)

    def _fail(self, deed: str, error: OSError) -> None:
        if self._warn:
            self._warn(f"cannot {deed} the line history {self._path}: {error.strerror}")
            self._warn = None


def _decode(line: bytes) -> str | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, str) else None
