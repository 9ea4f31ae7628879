"""What it takes to repeat an answer: prompt ids, sampling with its seed, ids that were said.

Off unless asked for, because it keeps prompts. One SQLite file that only its owner can read, shared
by all workers of this user; the oldest answers go when it is full. Knows no HTTP header and so no
key, no engine and no text.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from chatserve import environment
from chatserve.errors import CannotWrite, UsageError
from chatserve.private_database import (
    DatabaseFailed,
    NotPrivate,
    PrivateDatabase,
    prune,
)

logger = logging.getLogger(__name__)

MAX_ANSWERS = 10_000
MAX_BYTES = 256 * 1024 * 1024
_MAX_QUEUED = 1000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    place INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL,
    choice INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    record BLOB NOT NULL,
    UNIQUE (id, choice)
);
CREATE INDEX IF NOT EXISTS sizes ON answers (place, num_bytes);
"""


@dataclass(frozen=True)
class LoggedAnswer:
    """One choice of an answer.

    `id` of the answer; behind it, where a request has several prompts, `-` and the prompt's number.
    `created` in seconds since 1970. `model` is the base, `adapter` the name of one beside it.
    `sampling`: the fields of `SamplingParams` that decide which token comes next, with the seed
    that was drawn where the request brought none. `grammar`: the fields of `GrammarOrigin`, where
    it had to match one. `token_ids`: what was said. `finish_reason` None: the client left, or the
    engine failed.
    """

    id: str
    choice: int
    created: int
    model: str
    adapter: str | None
    fingerprint: str
    prompt_ids: Sequence[int]
    sampling: Mapping[str, Any]
    grammar: Mapping[str, Any] | None
    token_ids: Sequence[int]
    finish_reason: str | None

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self), option=orjson.OPT_NON_STR_KEYS)

    @staticmethod
    def from_json(data: bytes) -> LoggedAnswer:
        return LoggedAnswer(**orjson.loads(data))


def default_path() -> Path:
    return environment.home() / "replay.db"


class ReplayLog:
    """Writes answers in a thread of its own; no stream ever waits for the disk."""

    def __init__(
        self, path: Path, *, max_answers: int = MAX_ANSWERS, max_bytes: int = MAX_BYTES
    ) -> None:
        """Makes the file where there is none. Raises `UsageError` or `CannotWrite`."""
        self._max_answers = max_answers
        self._max_bytes = max_bytes
        self._queue: queue.Queue[LoggedAnswer | None] = queue.Queue(_MAX_QUEUED)
        self._is_failing = False
        self._database = PrivateDatabase(path, _SCHEMA)
        try:
            with self._database.reading():
                pass
        except NotPrivate as error:
            raise UsageError(
                f"--replay-log: {path} holds prompts, and {error}; chmod 600 it, or remove it"
            ) from error
        except DatabaseFailed as error:
            raise CannotWrite(
                f"--replay-log: cannot write {path} ({error}); remove it, or set CHATSERVE_HOME"
            ) from error
        self._thread = threading.Thread(target=self._write_all, name="replay log", daemon=True)
        self._thread.start()

    def add(self, answer: LoggedAnswer) -> None:
        """Keep it, soon. Called from the event loop: it never waits and never fails."""
        try:
            self._queue.put_nowait(answer)
        except queue.Full:
            self._complain(answer, "the disk is too slow")

    def flush(self) -> None:
        """Wait until all that has been added is written, or given up."""
        self._queue.join()

    def close(self) -> None:
        """Write what has been added."""
        self._queue.put(None)
        self._thread.join()
        self._database.close()

    def _write_all(self) -> None:
        while True:
            answer = self._queue.get()
            if answer is None:
                return
            try:
                self._write(answer)
            except (DatabaseFailed, CannotWrite) as error:
                self._complain(answer, str(error))
            except Exception as error:  # the end of this thread would be the end of the log
                self._complain(answer, f"{type(error).__name__}: {error}")
            else:
                self._is_failing = False
            finally:
                self._queue.task_done()

    def _write(self, answer: LoggedAnswer) -> None:
        record = answer.to_json()
        if len(record) > self._max_bytes:
            raise CannotWrite(f"it has {len(record):,} bytes, all may have {self._max_bytes:,}")
        with self._database.writing() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO answers (id, choice, num_bytes, record) "
                "VALUES (?, ?, ?, ?)",
                (answer.id, answer.choice, len(record), record),
            )
            prune(connection, "answers", self._max_answers, self._max_bytes)

    def _complain(self, answer: LoggedAnswer, reason: str) -> None:
        if not self._is_failing:
            logger.warning("%s and perhaps more is not in the replay log: %s", answer.id, reason)
        self._is_failing = True


def find(path: Path, answer_id: str) -> list[LoggedAnswer]:
    """All choices of the answer of that id. Raises `UsageError` where no log can be read."""
    with _read(path) as connection:
        rows = connection.execute(
            "SELECT record FROM answers WHERE id = ? OR id GLOB ? ORDER BY place",
            (answer_id, f"{answer_id}-[0-9]*"),
        )
        return [LoggedAnswer.from_json(record) for (record,) in rows]


def newest(path: Path, count: int) -> list[LoggedAnswer]:
    """The last `count` answers, newest first. Raises as `find` does."""
    with _read(path) as connection:
        rows = connection.execute(
            "SELECT record FROM answers ORDER BY place DESC LIMIT ?", (count,)
        )
        return [LoggedAnswer.from_json(record) for (record,) in rows]


@contextlib.contextmanager
def _read(path: Path) -> Iterator[sqlite3.Connection]:
    if not path.is_file():
        raise UsageError(
            f"{path}: there is no replay log; a server started with --replay-log keeps one"
        )
    try:
        with contextlib.closing(PrivateDatabase(path)) as database, database.reading() as reading:
            yield reading
    except NotPrivate as error:
        raise UsageError(f"{path}: {error}; chmod 600 it, or remove it") from error
    except (DatabaseFailed, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} cannot be read as a replay log ({error}); remove it") from error
