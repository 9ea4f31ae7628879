"""Chats that are kept on disk: sessions and their turns, in a SQLite file only its owner can read.

What `save` has returned from outlives this process and the machine, and several chats may save at
once. Nobody has the file open between two calls: so a damaged one can be put aside while others
chat. Knows no terminal and whom to tell of nothing.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chatserve import environment
from chatserve.cli import session_search
from chatserve.cli.session_search import Hit
from chatserve.cli.transcript import Transcript, Turn
from chatserve.private_database import DatabaseFailed, ReplaceableDatabase

VERSION = 2
MIN_ID_LEN = 3
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
"""
# ids are never used again: the full-text index points at turns by them
_TURNS = """
CREATE TABLE IF NOT EXISTS turns (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    session TEXT NOT NULL REFERENCES sessions (id),
    place INTEGER NOT NULL,
    role TEXT NOT NULL,
    content TEXT NOT NULL,
    is_partial INTEGER NOT NULL,
    saved_at REAL NOT NULL,
    UNIQUE (session, place)
);
"""
_TURN_COLUMNS = "session, place, role, content, is_partial, saved_at"


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
    model: str = ""


@dataclass(frozen=True)
class SessionInfo:
    """One of a list: `title` is how its first question begins, `changed_at` in s since 1970."""

    id: str
    name: str | None
    title: str
    changed_at: float
    num_turns: int
    model: str = ""


class SessionStore:
    """One chat's view of the file. Everything raises `DatabaseFailed`."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._database = ReplaceableDatabase(
            path,
            _SCHEMA + _TURNS + session_search.SCHEMA,
            version=VERSION,
            migrate=_migrate,
            clock=clock,
        )
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
        with self._database.writing() as connection:
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
            _delete_turns(connection, session_id, num_same)
            connection.executemany(
                f"INSERT INTO turns ({_TURN_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)",
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
            "template_name, num_examples, model FROM sessions "
        )
        wanted = _storable(wanted)
        some = "EXISTS (SELECT 1 FROM turns WHERE session = sessions.id)"
        with self._database.reading() as connection:
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
            session_id, name, writer, revision, *head, template, offset, model = rows[0]
            system, question, answer = head
            turns = [
                Turn(role, content, bool(is_partial))
                for role, content, is_partial in connection.execute(
                    "SELECT role, content, is_partial FROM turns WHERE session = ? ORDER BY place",
                    (session_id,),
                )
            ]
        transcript = Transcript(system, list(turns), (question, answer), template, offset)
        return Session(session_id, name, writer, revision, turns, model), transcript

    def recent(self, most: int) -> list[SessionInfo]:
        """The sessions that hold something, the newest first."""
        with self._database.reading() as connection:
            return _infos(connection, "1 ORDER BY changed_at DESC LIMIT ?", (most,))

    def search(self, words: Sequence[str]) -> list[tuple[SessionInfo, list[Hit]]]:
        """The sessions with turns that hold all `words`, or whose name does, the newest first."""
        words = [_storable(word) for word in words]
        hits = self._search_index(words) if self._is_large() else None
        with self._database.reading() as connection:
            if hits is None:
                hits = session_search.in_all(connection, words)
            by_session: dict[str, list[Hit]] = {}
            for hit in hits:
                by_session.setdefault(hit.session, []).append(hit)
            there = _infos(connection, "1 ORDER BY changed_at DESC", ())
        return [
            (info, by_session.get(info.id, []))
            for info in there
            if info.id in by_session or _is_in(words, info.name)
        ]

    def _search_index(self, words: Sequence[str]) -> list[Hit] | None:
        try:
            with self._database.writing() as connection:
                session_search.update_index(connection)
                return session_search.in_index(connection, words)
        except DatabaseFailed:  # no such index here, or it cannot be written or read
            return None

    def _is_large(self) -> bool:
        try:
            return self.path.stat().st_size >= session_search.MIN_INDEXED_BYTES
        except OSError:
            return False

    def delete(self, session_id: str) -> bool:
        """Leave nothing of a session in the file; False when there is no such session."""
        with self._database.writing() as connection:
            _delete_turns(connection, session_id, 0)
            cursor = connection.execute("DELETE FROM sessions WHERE id = ?", (session_id,))
            is_deleted = cursor.rowcount > 0
        self._database.forget_deleted()
        return is_deleted

    def rename(self, session: Session, name: str) -> bool:
        """False when another session has that name, or this one is gone."""
        with self._database.writing() as connection:
            try:
                renamed = connection.execute(
                    "UPDATE sessions SET name = ? WHERE id = ?", (_storable(name), session.id)
                ).rowcount
            except sqlite3.IntegrityError:
                return False
        session.name = name if renamed else session.name
        return renamed > 0

    def exists(self) -> bool:
        return self._database.exists()

    def check(self) -> None:
        """Raise `Damaged` when what is there is no whole database."""
        self._database.check()

    def put_aside(self) -> Path | None:
        """Give a damaged file another name, beside it; None when another chat has been faster."""
        return self._database.put_aside()

    def _take(self, connection: sqlite3.Connection, session: Session) -> bool:
        """Whether nobody else has changed the session since this chat has last seen it."""
        return bool(
            connection.execute(
                "UPDATE sessions SET writer = ?1, revision = revision + 1 "
                "WHERE id = ?2 AND (writer = ?1 OR (writer = ?3 AND revision = ?4))",
                (self._writer, session.id, session.writer, session.revision),
            ).rowcount
        )


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    """Version 1 had turns without ids."""
    connection.execute("ALTER TABLE turns RENAME TO turns_1")
    connection.execute(_TURNS)
    connection.execute(
        f"INSERT INTO turns ({_TURN_COLUMNS}) SELECT {_TURN_COLUMNS} FROM turns_1 ORDER BY rowid"
    )
    connection.execute("DROP TABLE turns_1")


def _infos(
    connection: sqlite3.Connection, condition: str, values: Sequence[int]
) -> list[SessionInfo]:
    rows = connection.execute(
        "SELECT id, name, (SELECT substr(content, 1, 200) FROM turns WHERE session = sessions.id "
        "AND role = 'user' ORDER BY place LIMIT 1), changed_at, "
        "(SELECT count(*) FROM turns WHERE session = sessions.id) AS num_turns, model "
        f"FROM sessions WHERE num_turns > 0 AND {condition}",
        values,
    )
    return [SessionInfo(*row) for row in rows]


def _delete_turns(connection: sqlite3.Connection, session_id: str, first_place: int) -> None:
    session_search.take_out(connection, session_id, first_place)
    connection.execute(
        "DELETE FROM turns WHERE session = ? AND place >= ?", (session_id, first_place)
    )


def _is_in(words: Sequence[str], name: str | None) -> bool:
    return name is not None and all(word.lower() in name.lower() for word in words)


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
