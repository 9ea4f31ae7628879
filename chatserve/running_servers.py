"""RunningServers: which servers of this user run on this machine, and how to reach them.

While `chatserve serve` runs, a private file says where it listens, what it serves and by which
token it may be told to serve something else. Knows files and locks; no processes, no HTTP.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from chatserve import environment

logger = logging.getLogger(__name__)

FOLDER = "running"
MAX_FILE_BYTES = 1024 * 1024


@dataclass(frozen=True)
class RunningModel:
    """`weights` as they were given, a path in full."""

    name: str
    weights: str


@dataclass(frozen=True)
class RunningServer:
    """One server that runs now.

    `url` reaches it from this machine and ends before `/v1`. `flags` are those of its models'
    form (`--load-8bit`); `control_token` opens what changes it, and nothing of `/v1`.
    """

    url: str
    pid: int
    started_at: float
    models: tuple[RunningModel, ...]
    control_token: str = dataclasses.field(repr=False)
    flags: tuple[str, ...] = ()

    def model_of(self, weights: str) -> RunningModel | None:
        """What it serves of `weights`."""
        wanted = full_weights(weights)
        return next((model for model in self.models if model.weights == wanted), None)


class Announcement:
    """A server's own file, held by a lock for as long as its process lives."""

    def __init__(self, file: Path | None, server: RunningServer) -> None:
        self._file = file
        self._server = server

    def tell(self, models: Iterable[RunningModel]) -> None:
        """It serves these now."""
        self._server = dataclasses.replace(self._server, models=tuple(models))
        if self._file is not None:
            try:
                _write(self._file, self._server)
            except OSError as error:
                logger.info("what is served here cannot be told to others: %s", error)


@contextlib.contextmanager
def announced(server: RunningServer) -> Iterator[Announcement]:
    """Let others find `server` until the end.

    A disk that takes no file is no reason not to serve: then nobody finds it. Nor does anybody
    where files have no such locks (Windows).
    """
    lock: IO[bytes] | None = None
    file: Path | None = None
    try:
        if sys.platform != "win32":
            folder = _folder()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(folder)
            lock, file = _held(folder)
            _write(file, server)
    except OSError as error:
        logger.info("this server is not announced to others: %s", error)
        _remove(file)
        file = None
    try:
        yield Announcement(file, server)
    finally:
        _remove(file)
        if lock is not None:
            lock.close()


def running_servers() -> list[RunningServer]:
    """Those that run now, the youngest first. What dead ones left is removed."""
    if sys.platform == "win32":
        return []
    found = []
    try:
        folder = _folder()
        locks = sorted(folder.glob("*.lock"))
        if locks:
            _check_private(folder)
    except OSError as error:
        logger.info("servers that run here are not to be found: %s", error)
        return []
    for lock in locks:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            if not _is_stale(lock) and (server := _read(lock.with_suffix(".json"))):
                found.append(server)
    return sorted(found, key=lambda server: server.started_at, reverse=True)


def full_weights(weights: str) -> str:
    """WEIGHTS by which two who mean the same path do so in the same words; names stay names."""
    path = Path(weights).expanduser()
    return str(path.resolve()) if path.exists() else weights


def _folder() -> Path:
    return environment.data() / FOLDER


def _check_private(folder: Path) -> None:
    """Raises `PermissionError`: a file in it could be somebody else's."""
    found = os.lstat(folder)
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is open to others; run chmod 700 on it")


def _held(folder: Path) -> tuple[IO[bytes], Path]:
    """A new lock, held, and the file that goes with it."""
    import fcntl

    while True:
        path = folder / f"{uuid.uuid4().hex}.lock"
        lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+b")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # who looked in between took it for a dead one's
            if os.fstat(lock.fileno()).st_nlink:
                return lock, path.with_suffix(".json")
        except BaseException:
            lock.close()
            path.unlink(missing_ok=True)
            raise
        lock.close()


def _is_stale(lock: Path) -> bool:
    """Whether nobody holds it any more; it is removed then.

    Shared, so that two who look at the same time do not take each other for the server.
    """
    import fcntl

    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        for left in (*lock.parent.glob(f"{lock.stem}[._]*"), lock):
            left.unlink(missing_ok=True)
        return True


def _remove(file: Path | None) -> None:
    if file is not None:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
            file.with_suffix(".lock").unlink(missing_ok=True)


def _write(file: Path, server: RunningServer) -> None:
    text = json.dumps({"host": socket.gethostname(), **dataclasses.asdict(server)})
    # private from its first byte on, and whole at all times
    fd, name = tempfile.mkstemp(dir=file.parent, prefix=f"{file.stem}_")
    try:
        with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape") as new:
            new.write(text)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read(file: Path) -> RunningServer | None:
    """None for another machine's, whose users' folders are the same. Raises what is wrong."""
    with file.open(encoding="utf-8", errors="surrogateescape") as opened:
        said: dict[str, Any] = json.loads(opened.read(MAX_FILE_BYTES))
    if said["host"] != socket.gethostname():
        return None
    return RunningServer(
        url=str(said["url"]),
        pid=int(said["pid"]),
        started_at=float(said["started_at"]),
        models=tuple(RunningModel(str(m["name"]), str(m["weights"])) for m in said["models"]),
        control_token=str(said["control_token"]),
        flags=tuple(map(str, said["flags"])),
    )
