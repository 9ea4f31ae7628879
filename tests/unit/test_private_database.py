"""A private file that several processes share: who waits for whom, and what ends a connection."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from chatserve import private_database
from chatserve.private_database import DatabaseFailed, PrivateDatabase

SCHEMA = "CREATE TABLE IF NOT EXISTS words (word TEXT);"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "words.db"


@pytest.fixture
def database(path: Path) -> Iterator[PrivateDatabase]:
    with closing(PrivateDatabase(path, SCHEMA, busy_timeout_s=0.05)) as database:
        yield database


def add(database: PrivateDatabase, word: str) -> None:
    with database.writing() as connection:
        connection.execute("INSERT INTO words VALUES (?)", (word,))


def words(database: PrivateDatabase) -> list[str]:
    with database.reading() as connection:
        return [word for (word,) in connection.execute("SELECT word FROM words")]


@pytest.fixture
def starter(path: Path) -> Iterator[sqlite3.Connection]:
    """Another process in the middle of making the same file."""
    path.touch(0o600)
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as starter:
        starter.execute("BEGIN")
        starter.execute("SELECT * FROM sqlite_master").fetchall()
        yield starter


def test_who_starts_beside_another_tries_again(
    database: PrivateDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite itself gives up at once when two turn the same new file to WAL."""
    refused: list[str] = []

    class Hasty(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            if "journal_mode" in sql and not refused:
                refused.append(sql)
                error = sqlite3.OperationalError("database is locked")
                error.sqlite_errorcode = sqlite3.SQLITE_BUSY
                raise error
            return super().execute(sql, *parameters)

    connect = partial(sqlite3.connect, factory=Hasty)
    monkeypatch.setattr(private_database.sqlite3, "connect", connect)
    add(database, "a")
    assert words(database) == ["a"] and refused


@pytest.mark.usefixtures("starter")
def test_but_not_for_ever(database: PrivateDatabase) -> None:
    with pytest.raises(DatabaseFailed, match=r"^database is locked$"):
        words(database)


def test_a_writer_has_the_file_from_the_beginning(path: Path, database: PrivateDatabase) -> None:
    """One that read first would be refused at once where another has written in the meantime."""
    with (
        database.writing(),
        closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other,
        pytest.raises(sqlite3.OperationalError, match="locked"),
    ):
        other.execute("BEGIN IMMEDIATE")


def test_a_writer_that_fails_leaves_nothing_and_the_next_goes_on(
    database: PrivateDatabase,
) -> None:
    with pytest.raises(ZeroDivisionError), database.writing() as connection:
        connection.execute("INSERT INTO words VALUES (?)", ("a",))
        raise ZeroDivisionError
    with pytest.raises(DatabaseFailed, match="no such table"), database.writing() as connection:
        connection.execute("INSERT INTO words VALUES (?)", ("b",))
        connection.execute("INSERT INTO lines VALUES (1)")
    add(database, "c")
    assert words(database) == ["c"]


def test_one_connection_for_all_threads(
    database: PrivateDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    connect = sqlite3.connect

    def counting(*arguments: Any, **options: Any) -> sqlite3.Connection:
        opened.append(arguments)
        return connect(*arguments, **options)

    monkeypatch.setattr(private_database.sqlite3, "connect", counting)
    threads = [threading.Thread(target=add, args=(database, word)) for word in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(words(database)) == ["a", "b", "c"] and len(opened) == 1


def test_a_file_that_was_removed_is_made_again(path: Path, database: PrivateDatabase) -> None:
    add(database, "a")
    path.unlink()
    add(database, "b")
    with closing(PrivateDatabase(path)) as another:
        assert words(another) == ["b"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_only_read_is_not_made(path: Path) -> None:
    with (
        closing(PrivateDatabase(path.parent / "missing" / "x.db")) as database,
        pytest.raises(DatabaseFailed, match="unable to open"),
    ):
        words(database)
    assert not path.parent.joinpath("missing").exists()


def test_a_folder_that_cannot_be_made(path: Path) -> None:
    path.touch()
    with (
        closing(PrivateDatabase(path / "x.db", SCHEMA)) as database,
        pytest.raises(DatabaseFailed, match=r"^Not a directory$"),
    ):
        words(database)
