"""A text in the user's own editor: `VISUAL`, else `EDITOR`, else vi.

Knows a temporary file that nobody else can read, and a process; no chat.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import tempfile
from pathlib import Path

from chatserve import environment
from chatserve.errors import UsageError


def edited(text: str) -> str:
    """`text` as the user left it. Raises `UsageError`: the editor is missing, or failed."""
    line = environment.editor()
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"cannot start the editor {line!r}: {error}") from error
    with tempfile.TemporaryDirectory(prefix="chatserve-") as folder:
        file = Path(folder) / "question.md"
        file.touch(0o600)
        file.write_text(text + "\n", "utf-8", errors="replace")  # half a character: a typed byte
        _run([*words, str(file)])
        try:
            return file.read_text("utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read what {words[0]} left: {error}") from error


def _run(words: list[str]) -> None:
    # Ctrl-C is the editor's; a handler that does nothing is not inherited, an ignored signal is
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        code = subprocess.run(words, check=False).returncode
    except OSError as error:
        raise UsageError(
            f"cannot start the editor {words[0]}: {error.strerror}; set EDITOR"
        ) from error
    finally:
        signal.signal(signal.SIGINT, before)
    if code:
        raise UsageError(f"the editor {words[0]} ended with exit code {code}")
