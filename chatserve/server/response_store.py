"""Responses that are kept so that others can go on from them: one SQLite file, bounded, private.

Whose a response is, is a hash of the API key; nobody sees another one's. The oldest go when there
are too many, when they are too large together, or when they are too old. There are bounds for each
key and for all together; where all are too much, those go of the key that has the most, so that no
key pushes out what others have kept. Knows no HTTP.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from chatserve import environment
from chatserve.errors import StorageFailed
from chatserve.private_database import (
    DatabaseFailed,
    NotPrivate,
    PrivateDatabase,
    prune,
)

logger = logging.getLogger(__name__)

MAX_RESPONSES = 10_000
MAX_BYTES = 256 * 1024 * 1024
# of one owner
MAX_OWN_RESPONSES = 2_500
MAX_OWN_BYTES = 64 * 1024 * 1024
MAX_AGE_S = 30 * 24 * 3600.0
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
CREATE INDEX IF NOT EXISTS sizes_by_owner ON responses (owner, place, num_bytes);
DROP INDEX IF EXISTS sizes;
CREATE INDEX IF NOT EXISTS ages ON responses (stored_at);
"""


@dataclass(frozen=True)
class KeptResponse:
    """A response as it was answered, and all items that it was answered to."""

    response: dict[str, Any]
    items: list[Any]


class ResponseStore:
    """Any thread may call, and several servers may share the file.

    There is no file before the first response. `clock` tells seconds since 1970. Every method
    raises `StorageFailed` where the file cannot be used; which file, only the log is told.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_responses: int = MAX_RESPONSES,
        max_bytes: int = MAX_BYTES,
        max_own_responses: int = MAX_OWN_RESPONSES,
        max_own_bytes: int = MAX_OWN_BYTES,
        max_age_s: float = MAX_AGE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._database = PrivateDatabase(path, _SCHEMA)
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._max_own_responses = max_own_responses
        self._max_own_bytes = min(max_own_bytes, max_bytes)
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
        if num_bytes > self._max_own_bytes:
            raise StorageFailed(
                f"the response has {num_bytes:,} bytes, all that are kept of a key may have "
                f"{self._max_own_bytes:,}"
            )
        now = self._clock()
        with self._told(), self._database.writing() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO responses (owner, id, stored_at, num_bytes, response, "
                "items) VALUES (?, ?, ?, ?, ?, ?)",
                (owner, kept.response["id"], now, num_bytes, response, items),
            )
            connection.execute(
                "DELETE FROM responses WHERE stored_at < ?", (now - self._max_age_s,)
            )
            prune(
                connection, "responses", self._max_own_responses, self._max_own_bytes, owner=owner
            )
            self._prune_all(connection)

    def _prune_all(self, connection: sqlite3.Connection) -> None:
        """Let the oldest go of whoever has the most, until all together are in bounds."""
        by_owner = "SELECT owner, count(*), sum(num_bytes) FROM responses GROUP BY owner"
        num_rows, num_bytes = {}, {}
        for owner, count, size in connection.execute(by_owner):
            num_rows[owner], num_bytes[owner] = count, size
        while True:
            if sum(num_bytes.values()) > self._max_bytes:
                most = max(num_bytes, key=lambda owner: num_bytes[owner])
            elif sum(num_rows.values()) > self._max_responses:
                most = max(num_rows, key=lambda owner: num_rows[owner])
            else:
                return
            place, size = connection.execute(
                "SELECT place, num_bytes FROM responses WHERE owner = ? ORDER BY place LIMIT 1",
                (most,),
            ).fetchone()
            connection.execute("DELETE FROM responses WHERE place = ?", (place,))
            num_rows[most] -= 1
            num_bytes[most] -= size

    def find(self, owner: bytes, response_id: str) -> KeptResponse | None:
        if not self._exists():
            return None
        with self._told(), self._database.reading() as connection:
            row = connection.execute(
                "SELECT response, items FROM responses "
                "WHERE owner = ? AND id = ? AND stored_at >= ?",
                (owner, response_id, self._clock() - self._max_age_s),
            ).fetchone()
        return None if row is None else KeptResponse(orjson.loads(row[0]), orjson.loads(row[1]))

    def delete(self, owner: bytes, response_id: str) -> bool:
        """Whether it was there."""
        if not self._exists():
            return False
        with self._told():
            with self._database.writing() as connection:
                deleted = connection.execute(
                    "DELETE FROM responses WHERE owner = ? AND id = ?", (owner, response_id)
                ).rowcount
            if deleted:
                self._database.forget_deleted()
        return deleted > 0

    def close(self) -> None:
        """Let go of the file; the next call opens it again."""
        self._database.close()

    def _exists(self) -> bool:
        with self._told():
            return self._path.exists()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (DatabaseFailed, PermissionError) as error:
            way_out = "chmod 600 it, or remove it" if isinstance(error, NotPrivate) else "remove it"
            logger.error(
                "%s cannot be used (%s); %s, or set CHATSERVE_HOME", self._path, error, way_out
            )
            raise StorageFailed(
                f"responses cannot be kept ({error}); send store: false, or see the server's log"
            ) from error
