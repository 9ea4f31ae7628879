"""Text files that go with a question: read within limits, fenced with their names.

Knows files and text; no terminal, no server.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from chatserve.errors import UsageError

MAX_FILES = 64
MAX_FILE_BYTES = 1024 * 1024
MAX_BYTES = 4 * 1024 * 1024
_TICKS = re.compile("`{3,}")
_SUFFIX = re.compile(r"[A-Za-z0-9+#_-]{1,12}")


@dataclass(frozen=True)
class Attachment:
    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode())

    def fenced(self) -> str:
        """A fence that the text itself cannot end, with the file's name and kind."""
        ticks = "`" * max([3, *(len(run) + 1 for run in _TICKS.findall(self.text))])
        suffix = Path(self.name).suffix[1:]
        kind = suffix if _SUFFIX.fullmatch(suffix) else ""
        name = " ".join(self.name.split())
        return f"{name}:\n{ticks}{kind}\n{self.text.rstrip(chr(10))}\n{ticks}"


@dataclass
class Attachments:
    """Those that wait for the next question."""

    files: list[Attachment] = field(default_factory=list)

    def add(self, attachments: list[Attachment]) -> None:
        """Raises `UsageError` when it becomes too many, or too much."""
        self.check_number(len(attachments))
        files = [*self.files, *attachments]
        num_bytes = sum(each.num_bytes for each in files)
        if num_bytes > MAX_BYTES:
            raise UsageError(
                f"{num_bytes:,} bytes wait then, the limit is {MAX_BYTES:,}; ask first"
            )
        self.files = files

    def check_number(self, num_more: int) -> None:
        """Before they are read. Raises `UsageError` when it becomes too many."""
        num_files = len(self.files) + num_more
        if num_files > MAX_FILES:
            raise UsageError(f"{num_files} files wait then, the limit is {MAX_FILES}; ask first")

    def before(self, question: str) -> str:
        """The question with all that waits in front of it; nothing waits any more."""
        files, self.files = self.files, []
        return "\n\n".join([*(each.fenced() for each in files), question])


def is_file(name: str) -> bool:
    """Whether all of it, blanks and stars, too, is one file's name."""
    return os.path.isfile(os.path.expanduser(name)) if "\0" not in name else False


def find_files(pattern: str) -> list[str]:
    """The files that a name with `~`, `*` and `?` means; itself where it is the name of one."""
    name = os.path.expanduser(pattern)
    if os.path.lexists(name) or not glob.has_magic(name):
        return [name]
    found = sorted(each for each in glob.glob(name) if os.path.isfile(each))
    if not found:
        raise UsageError(f"cannot attach {pattern}: no file has such a name")
    return found


def read_attachment(name: str, *, errors: str = "strict") -> Attachment:
    """`errors`: `replace` puts U+FFFD for what is no UTF-8.

    Raises `UsageError` for what is no text file of at most `MAX_FILE_BYTES`.
    """
    try:
        # a pipe that nobody writes to would be waited for
        handle = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UsageError(f"cannot attach {name}: it is no file")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot attach {name}: {error.strerror or error}") from error
    except ValueError as error:  # a name with a zero byte
        raise UsageError(f"cannot attach {name!r}: {error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"cannot attach {name}: it is over {MAX_FILE_BYTES:,} bytes")
    try:
        return Attachment(name, decoded(data, errors))
    except ValueError as error:
        raise UsageError(f"cannot attach {name}: it is {error}") from error


def decoded(data: bytes, errors: str = "strict") -> str:
    """UTF-8, or UTF-16 where it says so. Raises `ValueError`, which says what it is instead."""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 text (byte {error.start})") from error
    if "\0" in text:
        raise ValueError("a binary file, not text")
    return text.replace("\r\n", "\n")
