"""PrivateDatabase: a SQLite file that only its owner can read, which several processes share.

ReplaceableDatabase: the same for what nobody could make again: a damaged file is put aside, and
never written over. Both know no table but that of `prune`, and neither what is kept nor whom to
tell that it failed.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

MAX_CHECKED_BYTES = 32 * 1024 * 1024
BUSY_TIMEOUT_S = 5.0
_RETRY_S = 0.01
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_ALONE_S = 5.0
_MIN_PAGE_BYTES = 512
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


class ReplaceableDatabase:
    """A durable `PrivateDatabase` that nobody has open between two calls.

    So it can be put aside when it is damaged, while other processes go on with the new one. Its
    folder is its own. `version`: of `schema`; a file of a later one is left alone, one of an
    earlier is turned into it by `migrate` before the first change. Everything raises
    `DatabaseFailed`.
    """

    def __init__(
        self,
        path: Path,
        schema: str,
        *,
        version: int = 1,
        migrate: Callable[[sqlite3.Connection, int], None] = lambda _connection, _version: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._database = PrivateDatabase(path, schema, is_durable=True)
        self._version = version
        self._migrate = migrate
        self._clock = clock
        # the file is looked at beside SQLite, which ends the locks that another thread has on it
        self._alone = threading.Lock()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        with (
            self.held(),
            self._opened() as database,
            database.reading() as connection,
        ):
            self._refuse_newer(connection)
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        with (
            self.held(),
            self._opened() as database,
            database.writing() as connection,
        ):
            version = self._refuse_newer(connection)
            if version < self._version:
                if version:
                    self._migrate(connection, version)
                connection.execute(f"PRAGMA user_version = {self._version}")
            yield connection

    def forget_deleted(self) -> None:
        """Leave nothing of what was deleted in the journal, unless another process still reads."""
        with self.held(), self._opened() as database:
            database.forget_deleted()

    def exists(self) -> bool:
        try:
            return self._path.exists()
        except OSError as error:
            raise DatabaseFailed(error.strerror or str(error)) from error

    def check(self) -> None:
        """Raise `Damaged` when what is there is no whole database."""
        if self.exists():
            with self.reading() as connection:
                if self._path.stat().st_size <= MAX_CHECKED_BYTES:
                    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                    if verdict != "ok":
                        raise Damaged(" ".join(str(verdict).split()))

    def put_aside(self) -> Path | None:
        """Give a damaged file another name, beside it; None when somebody else has been faster."""
        with self.held(is_alone=True):
            try:
                with self._opened() as database, database.reading() as connection:
                    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                    if verdict == "ok":
                        return None
            except Damaged:
                pass
            stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(self._clock()))
            aside, number = self._path.with_name(f"{self._path.name}.damaged-{stamp}"), 1
            while os.path.lexists(aside):
                number += 1
                aside = self._path.with_name(f"{self._path.name}.damaged-{stamp}-{number}")
            try:
                # the file comes last: without its journal it is damaged still, and found again
                for suffix in ("-shm", "-wal", ""):
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(f"{self._path}{suffix}", f"{aside}{suffix}")
            except OSError as error:
                raise DatabaseFailed(error.strerror or str(error)) from error
            return aside

    @contextlib.contextmanager
    def held(self, *, is_alone: bool = False) -> Iterator[None]:
        """Keep the file in its place; with `is_alone`, keep others from opening it."""
        handle = None
        try:
            folder = self._path.parent
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.stat().st_mode & 0o077:
                folder.chmod(0o700)
            handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            _flock(handle, is_alone=is_alone)
        except OSError as error:
            if handle is not None:
                os.close(handle)
            raise DatabaseFailed(error.strerror or str(error)) from error
        try:
            with self._alone:
                yield
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[PrivateDatabase]:
        """The database, closed again in the end."""
        self._refuse_cut()
        with contextlib.closing(self._database):
            yield self._database

    def _refuse_cut(self) -> None:
        """SQLite would take what is left of a page for a whole one, or the file for a new one."""
        try:
            with self._path.open("rb") as file:
                head, size = file.read(18), os.fstat(file.fileno()).st_size
            has_journal = _size_of(self._path.with_name(self._path.name + "-wal")) > 0
        except FileNotFoundError:
            return
        except OSError as error:
            raise DatabaseFailed(error.strerror or str(error)) from error
        page_bytes = int.from_bytes(head[16:], "big") or _MIN_PAGE_BYTES
        if size == 0 and has_journal:
            raise Damaged("it is empty, its journal is not")
        if not has_journal and size % (65536 if page_bytes == 1 else page_bytes):
            raise Damaged("it ends inside a page")

    def _refuse_newer(self, connection: sqlite3.Connection) -> int:
        """The version of the file, 0 when it is new. Raises for one that is not known yet."""
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > self._version:
            raise DatabaseFailed(f"a newer chatserve has written it, version {version}")
        return int(version)


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


def _flock(handle: int, *, is_alone: bool) -> None:
    """Raises `OSError`: nobody waits for ever for a process that was stopped."""
    if sys.platform == "win32":
        return
    kind = fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH
    deadline = time.monotonic() + _ALONE_S
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_RETRY_S)


def _code(error: sqlite3.Error | OSError) -> int | None:
    """SQLite's, without what it says beside it."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _reason(error: sqlite3.Error | OSError) -> str:
    reason = error.strerror if isinstance(error, OSError) else None
    return " ".join((reason or str(error)).split())


def _size_of(file: Path) -> int:
    """0 where there is none; the last one who closes a database takes its journal away."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
