"""Chats that are kept on disk: sessions and their turns, in a SQLite file only its owner can read.

What `save` has returned from outlives this process and the machine, and several chats may save at
once. Nobody has the file open between two calls: so a damaged one can be put aside while others
chat. Knows no terminal and whom to tell of nothing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from chatserve import environment
from chatserve.cli.transcript import Transcript, Turn
from chatserve.private_database import Damaged, DatabaseFailed, PrivateDatabase

if sys.platform != "win32":
    import fcntl

VERSION = 1
MAX_CHECKED_BYTES = 32 * 1024 * 1024
MIN_ID_LEN = 3
_ALONE_S = 5.0
_RETRY_S = 0.01
_MIN_PAGE_BYTES = 512
# rowids: a full-text index may point at turns
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY,
    name TEXT UNIQUE,
    writer TEXT NOT NULL,
    revision INTEGER NOT NULL,
    begun_at REAL NOT NULL,
    changed_at REAL NOT NULL,
    model TEXT NOT NULL,
    system TEXT,
    question_role TEXT NOT NULL,
    answer_role TEXT NOT NULL,
    template_name TEXT NOT NULL,
    num_examples INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS changes ON sessions (changed_at);
CREATE TABLE IF NOT EXISTS turns (
    session TEXT NOT NULL REFERENCES sessions (id),
    place INTEGER NOT NULL,
    role TEXT NOT NULL,
    content TEXT NOT NULL,
    is_partial INTEGER NOT NULL,
    saved_at REAL NOT NULL,
    UNIQUE (session, place)
);
"""


@dataclass
class Session:
    """What a chat knows of its place in the store: who wrote it last, and the turns that are there.

    `writer` and `revision` are None before it has been found or saved.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(4))
    name: str | None = None
    writer: str | None = None
    revision: int | None = None
    turns: list[Turn] = field(default_factory=list)


@dataclass(frozen=True)
class SessionInfo:
    """One of a list: `title` is how its first question begins, `changed_at` in s since 1970."""

    id: str
    name: str | None
    title: str
    changed_at: float
    num_turns: int


class SessionStore:
    """One chat's view of the file. Everything raises `DatabaseFailed`."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._database = PrivateDatabase(path, _SCHEMA, is_durable=True)
        self._clock = clock
        self._writer = secrets.token_hex(8)

    @classmethod
    def of_user(cls) -> SessionStore:
        """The one that all chats of this user share; it may not exist yet."""
        return cls(environment.data() / "chats" / "chats.db")

    def save(self, session: Session, transcript: Transcript, model: str) -> bool:
        """Let the file hold `transcript` as `session`, in one transaction; updates `session`.

        False when another chat has gone on with it in the meantime, or it is gone: then this one
        has become a session of its own, with all its turns.
        """
        turns = list(transcript.turns)
        with self._writing() as connection:
            is_same = self._take(connection, session)
            session_id = session.id if is_same else _free_id(connection, session.id)
            num_same = _num_same(session.turns, turns) if is_same else 0
            now = self._clock()
            if not is_same:
                connection.execute(
                    "INSERT INTO sessions VALUES (?, NULL, ?, 0, ?, ?, '', NULL, '', '', '', 0)",
                    (session_id, self._writer, now, now),
                )
            connection.execute(
                "UPDATE sessions SET changed_at = ?, model = coalesce(nullif(?, ''), model), "
                "system = ?, question_role = ?, answer_role = ?, template_name = ?, "
                "num_examples = ? WHERE id = ?",
                (now, _storable(model),
                 None if transcript.system is None else _storable(transcript.system),
                 *map(_storable, transcript.roles), _storable(transcript.template_name),
                 transcript.offset, session_id),
            )  # fmt: skip
            connection.execute(
                "DELETE FROM turns WHERE session = ? AND place >= ?", (session_id, num_same)
            )
            connection.executemany(
                "INSERT INTO turns VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (session_id, place, turn.role, _storable(turn.content), turn.is_partial, now)
                    for place, turn in enumerate(turns[num_same:], num_same)
                ],
            )
        was_kept = session.writer is not None
        session.id, session.writer, session.turns = session_id, self._writer, turns
        if not is_same:
            session.name = None
        return is_same or not was_kept

    def find(self, wanted: str) -> tuple[Session, Transcript] | None:
        """The session of that name or id, or whose id alone begins so; `last`: the newest."""
        columns = (
            "SELECT id, name, writer, revision, system, question_role, answer_role, "
            "template_name, num_examples FROM sessions "
        )
        some = "EXISTS (SELECT 1 FROM turns WHERE session = id)"
        with self._reading() as connection:
            rows = connection.execute(
                columns + "WHERE id = ? OR name = ?", (wanted, wanted)
            ).fetchall()
            if not rows and wanted == "last":
                rows = connection.execute(
                    columns + f"WHERE {some} ORDER BY changed_at DESC LIMIT 1"
                ).fetchall()
            elif not rows and len(wanted) >= MIN_ID_LEN:
                rows = connection.execute(
                    columns + "WHERE substr(id, 1, length(?1)) = ?1", (wanted,)
                ).fetchall()
            if len(rows) != 1:
                return None
            ((session_id, name, writer, revision, system, question, answer, template, offset),) = (
                rows
            )
            turns = [
                Turn(role, content, bool(is_partial))
                for role, content, is_partial in connection.execute(
                    "SELECT role, content, is_partial FROM turns WHERE session = ? ORDER BY place",
                    (session_id,),
                )
            ]
        transcript = Transcript(system, list(turns), (question, answer), template, offset)
        return Session(session_id, name, writer, revision, turns), transcript

    def recent(self, most: int) -> list[SessionInfo]:
        """The sessions that hold something, the newest first."""
        with self._reading() as connection:
            return [
                SessionInfo(*row)
                for row in connection.execute(
                    "SELECT id, name, (SELECT substr(content, 1, 200) FROM turns WHERE session = id"
                    " AND role = 'user' ORDER BY place LIMIT 1), changed_at, count(*) "
                    "FROM sessions JOIN turns ON session = id GROUP BY id "
                    "ORDER BY changed_at DESC LIMIT ?",
                    (most,),
                )
            ]

    def rename(self, session: Session, name: str) -> bool:
        """False when another session has that name, or this one is gone."""
        with self._writing() as connection:
            try:
                renamed = connection.execute(
                    "UPDATE sessions SET name = ? WHERE id = ?", (_storable(name), session.id)
                ).rowcount
            except sqlite3.IntegrityError:
                return False
        session.name = name if renamed else session.name
        return renamed > 0

    def exists(self) -> bool:
        try:
            return self.path.exists()
        except OSError as error:
            raise DatabaseFailed(error.strerror or str(error)) from error

    def check(self) -> None:
        """Raise `Damaged` when what is there is no whole database."""
        if self.exists():
            with self._reading() as connection:
                if self.path.stat().st_size <= MAX_CHECKED_BYTES:
                    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                    if verdict != "ok":
                        raise Damaged(" ".join(str(verdict).split()))

    def put_aside(self) -> Path | None:
        """Give a damaged file another name, beside it; None when another chat has been faster."""
        with self._lock(is_alone=True):
            try:
                with self._opened() as database, database.reading() as connection:
                    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                    if verdict == "ok":
                        return None
            except Damaged:
                pass
            stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(self._clock()))
            aside, number = self.path.with_name(f"{self.path.name}.damaged-{stamp}"), 1
            while os.path.lexists(aside):
                number += 1
                aside = self.path.with_name(f"{self.path.name}.damaged-{stamp}-{number}")
            try:
                # the file comes last: without its journal it is damaged still, and found again
                for suffix in ("-shm", "-wal", ""):
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(f"{self.path}{suffix}", f"{aside}{suffix}")
            except OSError as error:
                raise DatabaseFailed(error.strerror or str(error)) from error
            return aside

    def _take(self, connection: sqlite3.Connection, session: Session) -> bool:
        """Whether nobody else has changed the session since this chat has last seen it."""
        return bool(
            connection.execute(
                "UPDATE sessions SET writer = ?1, revision = revision + 1 "
                "WHERE id = ?2 AND (writer = ?1 OR (writer = ?3 AND revision = ?4))",
                (self._writer, session.id, session.writer, session.revision),
            ).rowcount
        )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with (
            self._lock(),
            self._opened() as database,
            database.reading() as connection,
        ):
            _refuse_newer(connection)
            yield connection

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with (
            self._lock(),
            self._opened() as database,
            database.writing() as connection,
        ):
            if not _refuse_newer(connection):
                connection.execute(f"PRAGMA user_version = {VERSION}")
            yield connection

    @contextlib.contextmanager
    def _opened(self) -> Iterator[PrivateDatabase]:
        """The database, closed again in the end."""
        self._refuse_cut()
        with contextlib.closing(self._database):
            yield self._database

    def _refuse_cut(self) -> None:
        """SQLite would take what is left of a page for a whole one, or the file for a new one."""
        try:
            with self.path.open("rb") as file:
                head, size = file.read(18), os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return
        except OSError as error:
            raise DatabaseFailed(error.strerror or str(error)) from error
        journal = self.path.with_name(self.path.name + "-wal")
        has_journal = journal.exists() and journal.stat().st_size > 0
        page_bytes = int.from_bytes(head[16:], "big") or _MIN_PAGE_BYTES
        if size == 0 and has_journal:
            raise Damaged("it is empty, its journal is not")
        if not has_journal and size % (65536 if page_bytes == 1 else page_bytes):
            raise Damaged("it ends inside a page")

    @contextlib.contextmanager
    def _lock(self, *, is_alone: bool = False) -> Iterator[None]:
        """Keep the file in its place; with `is_alone`, keep others from opening it."""
        handle = None
        try:
            folder = self.path.parent
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
            yield
        finally:
            os.close(handle)


def _flock(handle: int, *, is_alone: bool) -> None:
    """Raises `OSError`: nobody waits for ever for a chat that was stopped."""
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


def _refuse_newer(connection: sqlite3.Connection) -> int:
    """The version of the file, 0 when it is new. Raises for one that this code does not know."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise DatabaseFailed(f"a newer chatserve has written it, version {version}")
    return int(version)


def _free_id(connection: sqlite3.Connection, wanted: str) -> str:
    while connection.execute("SELECT 1 FROM sessions WHERE id = ?", (wanted,)).fetchone():
        wanted = secrets.token_hex(4)
    return wanted


def _num_same(old: list[Turn], new: list[Turn]) -> int:
    """How many turns both begin with."""
    for index, (before, now) in enumerate(zip(old, new, strict=False)):
        if before is not now and before != now:
            return index
    return min(len(old), len(new))


def _storable(text: str) -> str:
    """Half a surrogate pair, which a terminal can send, is no text that a file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
