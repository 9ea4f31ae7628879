"""PrivateDatabase: a SQLite file that only its owner can read, which several processes share.

Knows no table but that of `prune`, and neither what is kept nor whom to tell that it failed.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

BUSY_TIMEOUT_S = 5.0
_RETRY_S = 0.01
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
# closing any descriptor of a file ends this process's locks on it, those of SQLite as well: no file
# is made while another thread may open it
_opening = threading.Lock()


class DatabaseFailed(Exception):
    """The file cannot be used; the reason in one line, without the path."""


class NotPrivate(DatabaseFailed):
    """Others than its owner may read the file."""


class Damaged(DatabaseFailed):
    """What is in the file is no database, or no longer a whole one."""


class PrivateDatabase:
    """One connection, opened by the first use and kept, for one thread at a time; others wait.

    `schema` makes the tables; without one, a file that is there is read and nothing is made. A file
    that was removed or replaced is opened anew. What was written outlives this process, and where
    it `is_durable` also the machine. Everything raises `DatabaseFailed`.
    """

    def __init__(
        self,
        path: Path,
        schema: str = "",
        *,
        is_durable: bool = False,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
    ) -> None:
        self._path = path
        self._schema = schema
        self._is_durable = is_durable
        self._busy_timeout_s = busy_timeout_s
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection to read with; what it reads must be fetched before this ends."""
        with self._lock:
            try:
                connection = self._connected()
                yield connection
            except (sqlite3.Error, OSError) as error:
                self._discard()
                kind = Damaged if _code(error) in _DAMAGED else DatabaseFailed
                raise kind(_reason(error)) from error

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it is written, or nothing."""
        with self.reading() as connection:
            # a transaction that begins with reading is refused, not kept waiting, when another
            # process has written in the meantime
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def forget_deleted(self) -> None:
        """Leave nothing of what was deleted in the journal, unless another process still reads."""
        with self.reading() as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        with self._lock:
            self._discard()

    def __del__(self) -> None:
        # the journal beside the file goes with the last connection
        self._discard()

    def _connected(self) -> sqlite3.Connection:
        file = self._find()
        if self._connection is None or file != self._file:
            self._discard()
            with _opening:
                if file is None and self._schema:
                    self._make()
                self._connection = self._open()
                self._file = self._find()
        return self._connection

    def _discard(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _find(self) -> tuple[int, int] | None:
        """Which file is there, if any. Raises `NotPrivate`."""
        try:
            found = os.lstat(self._path)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode):
            raise DatabaseFailed("it is a link, or no file at all")
        if found.st_uid != os.geteuid():
            raise NotPrivate("it belongs to another user")
        if found.st_mode & 0o077:
            raise NotPrivate(
                f"others than its owner may read it (mode {stat.S_IMODE(found.st_mode):o})"
            )
        return found.st_dev, found.st_ino

    def _make(self) -> None:
        """Private before its first byte; what SQLite puts beside it gets the same mode."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        self._find()

    def _open(self) -> sqlite3.Connection:
        """SQLite does not wait for others that turn a new file to WAL at the same time: we do."""
        deadline = time.monotonic() + self._busy_timeout_s
        while True:
            try:
                return self._open_once()
            except sqlite3.Error as error:
                if _code(error) not in _BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(_RETRY_S)

    def _open_once(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path,
            timeout=self._busy_timeout_s,
            isolation_level=None,  # transactions are begun by hand
            check_same_thread=False,
        )
        try:
            if self._schema:
                # a reader, or another process, never waits for a writer
                connection.execute("PRAGMA journal_mode = WAL")
                if self._is_durable:
                    connection.execute("PRAGMA synchronous = FULL")
                    connection.execute("PRAGMA fullfsync = ON")  # macOS: past the disk's own cache
                else:
                    connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute("PRAGMA journal_size_limit = 0")
                # what was deleted is not to be found in the file
                connection.execute("PRAGMA secure_delete = ON")
                connection.executescript(f"BEGIN IMMEDIATE; {self._schema} COMMIT;")
        except BaseException:
            connection.close()
            raise
        return connection


def prune(
    connection: sqlite3.Connection,
    table: str,
    max_rows: int,
    max_bytes: int,
    *,
    owner: bytes | None = None,
) -> None:
    """Let the oldest rows of `table` go, by `place`, until `num_bytes` and number are in bounds.

    `owner`: only those of one, who is named in the column of that name.
    """
    which, values = ("", ()) if owner is None else ("WHERE owner = ?", (owner,))
    num_rows, num_bytes = connection.execute(
        f"SELECT count(*), total(num_bytes) FROM {table} {which}", values
    ).fetchone()
    last = None
    for place, size in connection.execute(
        f"SELECT place, num_bytes FROM {table} {which} ORDER BY place", values
    ):
        if num_rows <= max_rows and num_bytes <= max_bytes:
            break
        num_rows, num_bytes, last = num_rows - 1, num_bytes - size, place
    if last is not None:
        which = f"{which} AND" if which else "WHERE"
        connection.execute(f"DELETE FROM {table} {which} place <= ?", (*values, last))


def _code(error: sqlite3.Error | OSError) -> int | None:
    """SQLite's, without what it says beside it."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _reason(error: sqlite3.Error | OSError) -> str:
    reason = error.strerror if isinstance(error, OSError) else None
    return " ".join((reason or str(error)).split())
