"""Finding words in kept turns: by reading all, and in large files by a full-text index, where
SQLite has one.

Works on a connection that the session store gives; both ways find the same: turns that hold all
words, as parts of longer ones, too. The index is made by the first search of a large file and knows
the turns up to a certain id; what is deleted of those is taken out of it with them.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

MAX_ROWS = 2000
MIN_INDEXED_LEN = 3  # trigrams
# below it reading all takes a sixth of a second, and the index would make the file four times as
# large (ADR 031)
MIN_INDEXED_BYTES = 32 * 1024 * 1024
SCHEMA = """
CREATE TABLE IF NOT EXISTS indexed (last_turn INTEGER NOT NULL);
"""
_INDEX = (
    "CREATE VIRTUAL TABLE IF NOT EXISTS turns_index USING "
    "fts5(content, content='turns', content_rowid='id', tokenize='trigram')"
)
_LAST = "SELECT coalesce(max(last_turn), 0) FROM indexed"
_COLUMNS = "SELECT session, place, role, turns.content FROM "
_ORDER = f" ORDER BY changed_at DESC, session, place LIMIT {MAX_ROWS}"
_SNIPPET_BEFORE, _SNIPPET_LEN = 30, 90


@dataclass(frozen=True)
class Hit:
    """A turn that holds the words; `place` is its place in the session."""

    session: str
    place: int
    role: str
    content: str


def update_index(connection: sqlite3.Connection) -> None:
    """Let the index know all turns, within a transaction. Fails where SQLite has no such index."""
    connection.execute(_INDEX)
    connection.execute(
        f"INSERT INTO turns_index (rowid, content) SELECT id, content FROM turns "
        f"WHERE id > ({_LAST})"
    )
    connection.execute("DELETE FROM indexed")
    connection.execute("INSERT INTO indexed SELECT coalesce(max(id), 0) FROM turns")


def in_index(connection: sqlite3.Connection, words: Sequence[str]) -> list[Hit] | None:
    """The turns with all `words`; None when all of them are too short for the index."""
    long = [word for word in words if len(word) >= MIN_INDEXED_LEN]
    short = [word for word in words if len(word) < MIN_INDEXED_LEN]
    if not long:
        return None
    match = " AND ".join('"' + word.replace('"', '""') + '"' for word in long)
    _let_hold(connection, short)
    rows = connection.execute(
        f"{_COLUMNS}turns_index JOIN turns ON turns.id = turns_index.rowid "
        f"JOIN sessions ON sessions.id = session WHERE turns_index MATCH ? "
        f"AND holds(turns.content){_ORDER}",
        (match,),
    )
    return [Hit(*row) for row in rows]


def in_all(connection: sqlite3.Connection, words: Sequence[str]) -> list[Hit]:
    """The turns with all `words`, by reading every one."""
    _let_hold(connection, words)
    rows = connection.execute(
        f"{_COLUMNS}turns JOIN sessions ON sessions.id = session WHERE holds(turns.content){_ORDER}"
    )
    return [Hit(*row) for row in rows]


def take_out(connection: sqlite3.Connection, session: str, first_place: int) -> None:
    """Take the turns of a session from that place on out of the index, before they are deleted.

    An index that cannot be changed goes as a whole.
    """
    rows = connection.execute(
        f"SELECT id, content FROM turns WHERE session = ? AND place >= ? AND id <= ({_LAST})",
        (session, first_place),
    ).fetchall()
    if not rows:
        return
    connection.execute("SAVEPOINT index_change")
    try:
        connection.executemany(
            "INSERT INTO turns_index (turns_index, rowid, content) VALUES ('delete', ?, ?)", rows
        )
        # what was deleted is not to be found in the file
        connection.execute("INSERT INTO turns_index (turns_index) VALUES ('optimize')")
    except sqlite3.Error:
        connection.execute("ROLLBACK TO index_change")
        _drop_index(connection)
    connection.execute("RELEASE index_change")


def snippet(content: str, words: Sequence[str]) -> str:
    """One line around the first word that is found."""
    text = " ".join(content.split())
    found = [
        match.start()
        for word in words
        if (match := re.search(re.escape(word), text, re.IGNORECASE)) is not None
    ]
    start = max(min(found, default=0) - _SNIPPET_BEFORE, 0)
    if start:
        start = text.find(" ", start, start + _SNIPPET_BEFORE) + 1 or start
    end = start + _SNIPPET_LEN
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")


def _let_hold(connection: sqlite3.Connection, words: Sequence[str]) -> None:
    """`holds(content)`: whether it has all words, however many, whatever the case."""
    wanted = [word.lower() for word in words]

    def holds(content: str) -> bool:
        text = content.lower()
        return all(word in text for word in wanted)

    connection.create_function("holds", 1, holds)


def _drop_index(connection: sqlite3.Connection) -> None:
    """Where SQLite cannot even open it, its tables go, and nothing is left that could be read."""
    try:
        connection.execute("DROP TABLE turns_index")
    except sqlite3.Error:
        for name in ("data", "idx", "docsize", "config"):
            with contextlib.suppress(sqlite3.Error):
                connection.execute(f"DROP TABLE IF EXISTS turns_index_{name}")
    connection.execute("DELETE FROM indexed")
