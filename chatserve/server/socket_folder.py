"""SocketFolder: where the workers of one supervisor listen, if nobody else is to reach them.

A private folder with a socket for each. Knows files and locks; no processes, no HTTP.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from chatserve import environment

logger = logging.getLogger(__name__)

PREFIX = "chatserve-run-"
LOCK = "lock"
MAX_PATH_BYTES = 100
"""Of a socket's name: some systems have room for 103."""


@contextlib.contextmanager
def socket_folder() -> Iterator[Path | None]:
    """A folder that only this user can enter, gone at the end.

    None where sockets have no files, or their names would be too long: then workers listen on
    loopback. Folders of servers that were killed are removed first.
    """
    if sys.platform == "win32" or not hasattr(socket, "AF_UNIX"):
        yield None
        return
    import fcntl

    parent = environment.runtime_folder()
    try:
        _sweep(parent)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    except OSError as error:
        logger.info("workers listen on loopback: no folder for sockets: %s", error)
        yield None
        return
    try:
        if len(os.fsencode(folder)) + 16 > MAX_PATH_BYTES:
            logger.info("workers listen on loopback: %s is too long for sockets", folder)
            yield None
            return
        with (folder / LOCK).open("w") as lock:
            # held as long as this process lives, however it ends
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove what servers left that could not clean up: nobody holds their lock."""
    import fcntl

    for folder in parent.glob(f"{PREFIX}*"):
        try:
            with (folder / LOCK).open() as lock:
                if os.fstat(lock.fileno()).st_uid != os.getuid():
                    continue
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # in use, somebody else's, or not ready yet
