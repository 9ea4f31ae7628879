"""Conversations and votes of the page: one SQLite file, private, bounded, apart for each owner.

Nothing that is kept goes by itself: where there is no room, the next one is refused. A damaged file
is put aside and a new one begun. A conversation is a JSON object of which only the fields of a
summary are looked at. Knows no HTTP.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import orjson

from chatserve import environment
from chatserve.errors import StorageFull, StorageUnavailable
from chatserve.private_database import Damaged, DatabaseFailed, NotPrivate, ReplaceableDatabase

logger = logging.getLogger(__name__)

MAX_OWN_CONVERSATIONS = 2_000
MAX_OWN_BYTES = 128 * 1024 * 1024
"""Of one owner, conversations and votes together."""
MAX_BYTES = 1024 * 1024 * 1024
"""Of all owners."""
PIECE_BYTES = 1024 * 1024
"""About as much of an owner's votes is read at a time."""
SUMMARY = ("id", "title", "revision", "created_at", "changed_at", "models")
_VERSION = 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS conversations (
    owner BLOB NOT NULL,
    id TEXT NOT NULL,
    revision INTEGER NOT NULL,
    changed_at REAL NOT NULL,
    num_bytes INTEGER NOT NULL,
    summary BLOB NOT NULL,
    document BLOB NOT NULL,
    PRIMARY KEY (owner, id)
);
CREATE INDEX IF NOT EXISTS conversations_by_age ON conversations (owner, changed_at);
CREATE INDEX IF NOT EXISTS sizes_of_conversations ON conversations (owner, num_bytes);
CREATE TABLE IF NOT EXISTS votes (
    place INTEGER PRIMARY KEY AUTOINCREMENT,
    owner BLOB NOT NULL,
    num_bytes INTEGER NOT NULL,
    vote BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS sizes_of_votes ON votes (owner, num_bytes);
CREATE INDEX IF NOT EXISTS votes_by_place ON votes (owner, place);
"""

Document = dict[str, Any]
Result = TypeVar("Result")


class ChangedElsewhere(Exception):
    """The newest revision is another one: that of `newer`, which is None when it is gone."""

    def __init__(self, newer: Document | None) -> None:
        super().__init__("the conversation was changed elsewhere")
        self.newer = newer


class ConversationStore:
    """Any thread may call, and several servers may share the file.

    Every method raises `StorageUnavailable` where the file cannot be used, and `StorageFull` where
    it cannot grow; which file, only the log is told.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_own_conversations: int = MAX_OWN_CONVERSATIONS,
        max_own_bytes: int = MAX_OWN_BYTES,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._database = ReplaceableDatabase(path, _SCHEMA, version=_VERSION, clock=clock)
        self._max_own_conversations = max_own_conversations
        self._max_own_bytes = max_own_bytes
        self._max_bytes = max_bytes

    @classmethod
    def of_user(cls) -> ConversationStore:
        """The one that all servers of this user share; it may not exist yet."""
        return cls(environment.data() / "page" / "conversations.db")

    def summaries(self, owner: bytes, search: str = "") -> list[Document]:
        """The newest first; only those whose title or messages have the text `search`."""

        def read(connection: sqlite3.Connection) -> list[Document]:
            order = "FROM conversations WHERE owner = ? ORDER BY changed_at DESC, id"
            if not search:
                rows = connection.execute(f"SELECT summary {order}", (owner,))
                return [orjson.loads(summary) for (summary,) in rows]
            wanted = search.casefold()
            return [
                orjson.loads(summary)
                for summary, document in connection.execute(
                    f"SELECT summary, document {order}", (owner,)
                )
                if _has_text(orjson.loads(document), wanted)
            ]

        return self._read(read, [])

    def find(self, owner: bytes, conversation_id: str) -> Document | None:
        return self._read(lambda connection: _find(connection, owner, conversation_id), None)

    def put(self, owner: bytes, document: Document) -> Document:
        """Keep it in the place of the revision that it names, 0 for a new one.

        Returns its summary, with the next revision. Raises `ChangedElsewhere`.
        """

        def write(connection: sqlite3.Connection) -> Document:
            found = connection.execute(
                "SELECT revision FROM conversations WHERE owner = ? AND id = ?",
                (owner, document["id"]),
            ).fetchone()
            if document["revision"] != (found[0] if found else 0):
                raise ChangedElsewhere(_find(connection, owner, document["id"]))
            kept = {**document, "revision": document["revision"] + 1}
            encoded, summary = orjson.dumps(kept), {name: kept[name] for name in SUMMARY}
            # what stands there already makes room for itself
            connection.execute(
                "DELETE FROM conversations WHERE owner = ? AND id = ?", (owner, document["id"])
            )
            self._check_room(connection, owner, len(encoded), is_vote=False)
            connection.execute(
                "INSERT INTO conversations VALUES (?, ?, ?, ?, ?, ?, ?)",
                (owner, kept["id"], kept["revision"], kept["changed_at"], len(encoded),
                 orjson.dumps(summary), encoded),
            )  # fmt: skip
            return summary

        return self._write(write)

    def delete(self, owner: bytes, conversation_id: str) -> None:
        """Also when it is gone already."""
        self._delete("conversations WHERE owner = ? AND id = ?", (owner, conversation_id))

    def add_vote(self, owner: bytes, vote: Document) -> None:
        encoded = orjson.dumps(vote)

        def write(connection: sqlite3.Connection) -> None:
            self._check_room(connection, owner, len(encoded), is_vote=True)
            connection.execute(
                "INSERT INTO votes (owner, num_bytes, vote) VALUES (?, ?, ?)",
                (owner, len(encoded), encoded),
            )

        self._write(write)

    def votes(self, owner: bytes, after: int = 0) -> list[tuple[int, bytes]]:
        """The next ones after that place, each with its own, as JSON; none where that was the last.

        In the order in which they were given; as many as fill a piece.
        """

        def read(connection: sqlite3.Connection) -> list[tuple[int, bytes]]:
            found: list[tuple[int, bytes]] = []
            num_bytes = 0
            for place, vote in connection.execute(
                "SELECT place, vote FROM votes INDEXED BY votes_by_place "
                "WHERE owner = ? AND place > ? ORDER BY place",
                (owner, after),
            ):
                found.append((place, vote))
                num_bytes += len(vote)
                if num_bytes >= PIECE_BYTES:
                    break
            return found

        return self._read(read, [])

    def delete_votes(self, owner: bytes) -> None:
        self._delete("votes WHERE owner = ?", (owner,))

    def _delete(self, which: str, values: tuple[object, ...]) -> None:
        if not self._exists():
            return
        self._write(lambda connection: connection.execute(f"DELETE FROM {which}", values).rowcount)

    def _check_room(
        self, connection: sqlite3.Connection, owner: bytes, num_bytes: int, *, is_vote: bool
    ) -> None:
        """Raises `StorageFull` where so many bytes are too much."""
        number, own = connection.execute(
            "SELECT count(*), total(num_bytes) FROM conversations WHERE owner = ?", (owner,)
        ).fetchone()
        own += _sum(connection, "votes WHERE owner = ?", owner)
        way_out = "delete some, or let the browser keep this one"
        if not is_vote and number >= self._max_own_conversations:
            raise StorageFull(
                f"{number:,} conversations are kept, which is all there may be; {way_out}"
            )
        if own + num_bytes > self._max_own_bytes:
            raise StorageFull(
                f"with this there would be {int(own) + num_bytes:,} bytes of conversations and "
                f"votes, the limit is {self._max_own_bytes:,}; {way_out}"
            )
        all_bytes = _sum(connection, "conversations") + _sum(connection, "votes")
        if all_bytes + num_bytes > self._max_bytes:
            raise StorageFull(
                f"this server keeps {self._max_bytes:,} bytes of conversations for all its users, "
                "and there is no room for more; let the browser keep this one"
            )

    def _exists(self) -> bool:
        with self._told():
            return self._database.exists()

    def _read(self, work: Callable[[sqlite3.Connection], Result], nothing: Result) -> Result:
        if not self._exists():
            return nothing

        def read() -> Result:
            with self._database.reading() as connection:
                return work(connection)

        return self._replacing(read)

    def _write(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        def write() -> Result:
            with self._database.writing() as connection:
                return work(connection)

        return self._replacing(write)

    def _replacing(self, work: Callable[[], Result]) -> Result:
        """`work`, once more with a new file where this one is damaged."""
        with self._told():
            try:
                return work()
            except Damaged as error:
                if (aside := self._database.put_aside()) is not None:
                    logger.error(
                        "%s was damaged (%s) and is now %s; a new one is begun",
                        self._path, error, aside,
                    )  # fmt: skip
                return work()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except DatabaseFailed as error:
            way_out = "chmod 600 it" if isinstance(error, NotPrivate) else "see to its disk"
            logger.error(
                "%s cannot be used (%s); %s, or set CHATSERVE_HOME", self._path, error, way_out
            )
            kind = StorageFull if _is_full(error) else StorageUnavailable
            raise kind(
                f"conversations cannot be kept on the server ({error}); let the browser keep them, "
                "or see the server's log"
            ) from error


def _find(connection: sqlite3.Connection, owner: bytes, conversation_id: str) -> Document | None:
    row = connection.execute(
        "SELECT document FROM conversations WHERE owner = ? AND id = ?", (owner, conversation_id)
    ).fetchone()
    return None if row is None else orjson.loads(row[0])


def _sum(connection: sqlite3.Connection, which: str, *values: object) -> int:
    (total,) = connection.execute(f"SELECT total(num_bytes) FROM {which}", values).fetchone()
    return int(total)


def _has_text(document: Document, wanted: str) -> bool:
    texts = (document["title"], *(message["content"] for message in document["messages"]))
    return any(wanted in text.casefold() for text in texts)


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk, or a limit on files, is behind it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            return True
        error = error.__cause__
    return False
