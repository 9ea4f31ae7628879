"""Exchange of two folders' names in one step of the system, and locks on folders.

`os` has neither; a rename alone cannot replace a folder that holds files. Knows no file format.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # Linux, renameat2
_RENAME_SWAP = 2  # macOS, renamex_np


def exchange(first: Path, second: Path) -> None:
    """Swap the names of two folders: no moment in which either is missing.

    Raises `OSError` where the system or the file system cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform == "darwin":
        failed = libc.renamex_np(names[0], names[1], _RENAME_SWAP)
    else:
        failed = libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(second))


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[int]:
    """A descriptor of `folder`, for locks and fsync."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def sync(folder: Path) -> None:
    """Afterwards the names in `folder` survive a crash of the machine."""
    with opened(folder) as handle:
        os.fsync(handle)


def lock(handle: int) -> bool:
    """Take the lock on an open folder, which closing frees.

    False when another process has it, or when the file system has no locks.
    """
    import fcntl  # POSIX only

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
