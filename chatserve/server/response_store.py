"""Responses that are kept so that others can go on from them: one SQLite file, bounded, private.

Whose a response is, is a hash of the API key; nobody sees another one's. The oldest go when there
are too many, when they are too large together, or when they are too old. Knows no HTTP.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from chatserve import environment
from chatserve.errors import StorageFailed

MAX_RESPONSES = 10_000
MAX_BYTES = 256 * 1024 * 1024
MAX_AGE_S = 30 * 24 * 3600.0
_BUSY_TIMEOUT_S = 5.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    place INTEGER PRIMARY KEY AUTOINCREMENT,
    owner BLOB NOT NULL,
    id TEXT NOT NULL,
    stored_at REAL NOT NULL,
    num_bytes INTEGER NOT NULL,
    response BLOB NOT NULL,
    items BLOB NOT NULL,
    UNIQUE (owner, id)
);
CREATE INDEX IF NOT EXISTS sizes ON responses (place, stored_at, num_bytes);
"""


@dataclass(frozen=True)
class KeptResponse:
    """A response as it was answered, and all items that it was answered to."""

    response: dict[str, Any]
    items: list[Any]


class ResponseStore:
    """Opens the file for each call, so that any thread may call and several servers may share it.

    There is no file before the first response. `clock` tells seconds since 1970. Every method
    raises `StorageFailed` where the file cannot be used.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_responses: int = MAX_RESPONSES,
        max_bytes: int = MAX_BYTES,
        max_age_s: float = MAX_AGE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock = clock

    @classmethod
    def at_home(cls) -> ResponseStore:
        """The one that all servers of this user share."""
        return cls(environment.home() / "responses.db")

    def add(self, owner: bytes, kept: KeptResponse) -> None:
        """Keep it, also in the place of what it was before, and let go what is too much."""
        response, items = orjson.dumps(kept.response), orjson.dumps(kept.items)
        num_bytes = len(response) + len(items)
        if num_bytes > self._max_bytes:
            raise StorageFailed(
                f"the response has {num_bytes:,} bytes, all that are kept may have "
                f"{self._max_bytes:,}"
            )
        _make_private(self._path)
        now = self._clock()
        with self._opened() as database, database:
            database.execute(
                "INSERT OR REPLACE INTO responses (owner, id, stored_at, num_bytes, response, "
                "items) VALUES (?, ?, ?, ?, ?, ?)",
                (owner, kept.response["id"], now, num_bytes, response, items),
            )
            # newest first, as many as there is room for
            database.execute(
                "DELETE FROM responses WHERE stored_at < ? OR place <= (SELECT max(place) FROM ("
                "SELECT place, count(*) OVER newer AS number, sum(num_bytes) OVER newer AS total "
                "FROM responses WINDOW newer AS (ORDER BY place DESC)) "
                "WHERE number > ? OR total > ?)",
                (now - self._max_age_s, self._max_responses, self._max_bytes),
            )

    def find(self, owner: bytes, response_id: str) -> KeptResponse | None:
        if not self._path.exists():
            return None
        with self._opened() as database:
            row = database.execute(
                "SELECT response, items FROM responses "
                "WHERE owner = ? AND id = ? AND stored_at >= ?",
                (owner, response_id, self._clock() - self._max_age_s),
            ).fetchone()
        return None if row is None else KeptResponse(orjson.loads(row[0]), orjson.loads(row[1]))

    def delete(self, owner: bytes, response_id: str) -> bool:
        """Whether it was there."""
        if not self._path.exists():
            return False
        with self._opened() as database, database:
            deleted = database.execute(
                "DELETE FROM responses WHERE owner = ? AND id = ?", (owner, response_id)
            )
            return deleted.rowcount > 0

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(
                sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S)
            ) as database:
                # a reader, or another server, never waits for a writer
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("PRAGMA synchronous = NORMAL")
                # what was deleted is not to be found in the file
                database.execute("PRAGMA secure_delete = ON")
                database.executescript(_SCHEMA)
                yield database
        except (sqlite3.Error, OSError) as error:
            raise StorageFailed(
                f"responses cannot be kept in {self._path} ({error}); send store: false, or move "
                "CHATSERVE_HOME"
            ) from error


def _make_private(path: Path) -> None:
    """Its own before its first byte; what SQLite puts beside it gets the same mode."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StorageFailed(
            f"responses cannot be kept in {path} ({error.strerror}); send store: false, or move "
            "CHATSERVE_HOME"
        ) from error
    try:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
    finally:
        os.close(fd)
    if mode & 0o077:
        raise StorageFailed(
            f"{path} holds prompts, and others than its owner may read it (mode {mode:o}); chmod "
            "600 it, or remove it"
        )
