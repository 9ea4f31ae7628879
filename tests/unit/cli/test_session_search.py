"""Searching all chats: the index finds what reading all finds, forgets what is deleted, and is no
more than a help: without it, or with a broken one, the same is found."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from chatserve.cli import session_search, session_store
from chatserve.cli.kept_chat import KeptChat, found_rows
from chatserve.cli.session_search import snippet
from chatserve.cli.session_store import Session, SessionStore
from chatserve.cli.transcript import Transcript, Turn
from chatserve.errors import UsageError
from tests.unit.cli.test_session_store import said

CHATS = {
    "trip": ("Where is it warm in November?", "On Madeira, and in Málaga."),
    "code": ("Sort a LIST in python", "Use sorted(list).\nIt is stable: 100% of the time."),
    "你好": ("世界很大，你好", "Straße nach İstanbul 'quoted' \"twice\" a_b"),
}
SCHEMA_1 = """
CREATE TABLE sessions (
    id TEXT PRIMARY KEY, name TEXT UNIQUE, writer TEXT NOT NULL, revision INTEGER NOT NULL,
    begun_at REAL NOT NULL, changed_at REAL NOT NULL, model TEXT NOT NULL, system TEXT,
    question_role TEXT NOT NULL, answer_role TEXT NOT NULL, template_name TEXT NOT NULL,
    num_examples INTEGER NOT NULL
);
CREATE INDEX changes ON sessions (changed_at);
CREATE TABLE turns (
    session TEXT NOT NULL REFERENCES sessions (id), place INTEGER NOT NULL, role TEXT NOT NULL,
    content TEXT NOT NULL, is_partial INTEGER NOT NULL, saved_at REAL NOT NULL,
    UNIQUE (session, place)
);
PRAGMA user_version = 1;
"""


@pytest.fixture(autouse=True)
def any_file_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_search, "MIN_INDEXED_BYTES", 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "chats" / "chats.db"


@pytest.fixture
def store(path: Path) -> SessionStore:
    times = iter(range(1000, 2000))
    return SessionStore(path, clock=lambda: next(times))


def filled(store: SessionStore) -> dict[str, Session]:
    sessions = {}
    for name, texts in CHATS.items():
        sessions[name] = Session()
        store.save(sessions[name], said(*texts), "m")
        assert store.rename(sessions[name], name)
    return sessions


def names(store: SessionStore, words: str) -> list[tuple[str | None, list[int]]]:
    """The chats and places that are found."""
    found = store.search(words.split())
    return [(info.name, [hit.place for hit in hits]) for info, hits in found]


def without_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a SQLite that was built without FTS5, or is too old for trigrams."""
    monkeypatch.setattr(session_search, "_INDEX", session_search._INDEX.replace("fts5", "fts9"))


@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("november", [("trip", [0])]),
        ("NOV where", [("trip", [0])]),
        ("november madeira", []),  # not in one turn
        ("in", [("你好", []), ("code", []), ("trip", [])]),
        ("list", [("code", [0, 1])]),
        ("MÁLAGA", [("trip", [1])]),
        ("世界很", [("你好", [0])]),
        ("世", [("你好", [0])]),
        ("100%", [("code", [1])]),
        ("a_b", [("你好", [1])]),
        ("\"twice\" 'quoted'", [("你好", [1])]),
        ("AND", [("trip", [1])]),
        ("col:x OR *", []),
        ("trip", [("trip", [])]),
        ("nowhere", []),
    ],
)
def test_turns_with_all_words_are_found(
    words: str, found: list[tuple[str, list[int]]], has_index: bool, store: SessionStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    filled(store)
    if not has_index:
        without_index(monkeypatch)
    seen = names(store, words)
    if words == "in":
        expected = {
            name: [i for i, text in enumerate(texts) if "in" in text.lower()]
            for name, texts in CHATS.items()
        }
        found = [(name, expected[name]) for name, _ in found if expected[name] or "in" in name]
    assert seen == found


def indexed(path: Path, text: str) -> bool:
    """Whether the index itself holds `text`, be it among the turns or not."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(
            "SELECT rowid FROM turns_index WHERE turns_index MATCH ?", (text,)
        )
        return bool(rows.fetchall())


@pytest.mark.parametrize("min_bytes", [0, 1 << 40], ids=["index", "all"])
def test_any_words_may_be_searched_for(
    store: SessionStore, min_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_search, "MIN_INDEXED_BYTES", min_bytes)
    store.save(Session(), said("hello there", "yes"), "m")
    assert len(store.search(["h", "hello"] * 2000)) == 1
    assert store.search(["hello"] * 2000 + ["no"]) == []
    for word in ('"hel', "NOT(", "hello:", "a\0b", "\ud800", "\udcffabc", "%"):
        assert store.search([word]) == []
        assert store.find(word) is None


def test_the_index_is_used_and_knows_what_came_later(store: SessionStore, path: Path) -> None:
    sessions = filled(store)
    assert names(store, "november") == [("trip", [0])]
    assert indexed(path, "november")
    transcript = said(*CHATS["trip"], "And in December?", "Hardly.")
    store.save(sessions["trip"], transcript, "m")
    assert not indexed(path, "december")
    assert names(store, "december") == [("trip", [2])]
    assert indexed(path, "december")


def test_a_small_file_has_no_index(
    store: SessionStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(store)
    monkeypatch.setattr(session_search, "MIN_INDEXED_BYTES", path.stat().st_size + 1)
    assert names(store, "november") == [("trip", [0])]
    with pytest.raises(sqlite3.OperationalError, match="no such table: turns_index"):
        indexed(path, "november")


def test_what_is_taken_back_leaves_the_index(store: SessionStore, path: Path) -> None:
    sessions = filled(store)
    store.search(["november"])
    store.save(sessions["trip"], said("Where is it cold?"), "m")
    assert not indexed(path, "november")
    assert names(store, "november") == []
    assert names(store, "cold") == [("trip", [0])]


def test_nothing_of_a_deleted_chat_is_in_the_file(store: SessionStore, path: Path) -> None:
    secret = "a most singular zeppelin"
    session = Session()
    store.save(session, said(secret, "about " * 3000 + secret), "m")
    filled(store)
    assert len(store.search(["zeppelin"])) == 1
    assert b"zeppelin" in everything(path)
    assert store.delete(session.id)
    assert not store.delete(session.id)
    assert store.search(["zeppelin"]) == [] and store.find(session.id) is None
    assert [word for word in (b"zeppelin", b"zep", b"ppe") if word in everything(path)] == []
    assert names(store, "november") == [("trip", [0])]


def everything(path: Path) -> bytes:
    """All bytes beside and in the file, but those that every file of this kind has."""
    return b"".join(file.read_bytes() for file in path.parent.iterdir())


def test_a_chat_that_others_have_open_is_deleted_and_begins_anew_there(store: SessionStore) -> None:
    sessions = filled(store)
    assert store.delete(sessions["trip"].id)
    assert not store.save(sessions["trip"], said("still", "here"), "m")
    assert names(store, "still") == [(None, [0])]


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM turns_index_data WHERE id = 10",
        "UPDATE turns_index_data SET block = x'00' WHERE id > 10",
        "UPDATE turns_index_config SET v = 99",  # of a later SQLite
        "DROP TABLE turns_index_idx",
    ],
)
def test_a_broken_index_loses_nothing_and_keeps_nothing(
    damage: str, store: SessionStore, path: Path
) -> None:
    sessions = filled(store)
    store.search(["november"])
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(damage)
        connection.commit()
    with pytest.raises(sqlite3.DatabaseError):
        indexed(path, "november")
    assert names(store, "november") == [("trip", [0])]
    store.save(sessions["trip"], said("Where is it cold?"), "m")
    assert names(store, "cold") == [("trip", [0])]
    assert store.delete(sessions["code"].id)
    assert names(store, "sorted") == []
    assert b"sorted" not in everything(path) and b"november" not in everything(path)
    store.check()


def test_a_file_that_cannot_be_written_is_searched(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(store)

    def full(_: sqlite3.Connection) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(session_search, "update_index", full)
    assert names(store, "november") == [("trip", [0])]


def version_1(path: Path, chats: Sequence[tuple[str, Sequence[str]]]) -> None:
    path.parent.mkdir(parents=True, mode=0o700)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA_1)
        for session_id, texts in chats:
            connection.execute(
                "INSERT INTO sessions VALUES (?, ?, 'w', 3, 1, ?, 'm', 'be brief', "
                "'H', 'A', 't', 1)",
                (session_id, f"name of {session_id}", 9 - len(texts[0])),
            )
            connection.executemany(
                "INSERT INTO turns VALUES (?, ?, ?, ?, ?, 2)",
                [
                    (session_id, place, ("user", "assistant")[place % 2], text, place == 3)
                    for place, text in enumerate(texts)
                ],
            )
        connection.commit()
    path.chmod(0o600)


def test_a_file_of_version_1_is_read_searched_and_changed(path: Path) -> None:
    version_1(path, [("abc1", ("q", "a", "q2", "half")), ("abc2", ("other", "thing"))])
    store = SessionStore(path)
    expected = Transcript(
        "be brief",
        [Turn("user", "q"), Turn("assistant", "a"), Turn("user", "q2"),
         Turn("assistant", "half", True)],
        ("H", "A"), "t", 1,
    )  # fmt: skip
    found = store.find("abc1")
    assert found is not None and found[1] == expected
    assert [(info.id, info.num_turns) for info in store.recent(5)] == [("abc1", 4), ("abc2", 2)]
    assert version(path) == 1
    session, transcript = found
    transcript.ask("q3")
    assert store.save(session, transcript, "m")
    assert version(path) == session_store.VERSION
    found = SessionStore(path).find("name of abc1")
    assert found is not None and found[1] == transcript
    assert names(store, "thing") == [("name of abc2", [1])]
    store.check()


def test_a_search_alone_migrates_or_reads_a_file_of_version_1(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version_1(path, [("abc1", ("q", "what is sought"))])
    with monkeypatch.context() as patch:
        without_index(patch)
        assert names(SessionStore(path), "sought") == [("name of abc1", [1])]
        assert version(path) == 1
    assert names(SessionStore(path), "sought") == [("name of abc1", [1])]
    assert version(path) == session_store.VERSION


def test_a_migration_that_fails_leaves_the_file_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version_1(path, [("abc1", ("q", "a"))])
    monkeypatch.setattr(session_store, "_TURN_COLUMNS", "session, place, nonsense")
    told: list[str] = []
    chat = KeptChat(SessionStore(path), told.append)
    chat.keep(said("new", "turn"), "m")
    assert len(told) == 1 and "is not kept" in told[0]
    monkeypatch.undo()
    assert version(path) == 1
    found = SessionStore(path).find("abc1")
    assert found is not None and [turn.content for turn in found[1].turns] == ["q", "a"]


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        (number,) = connection.execute("PRAGMA user_version").fetchone()
        return int(number)


@pytest.mark.parametrize(
    ("content", "words", "shown"),
    [
        ("one two", ["TWO"], "one two"),
        ("x " * 100 + "needle " + "y " * 100, ["needle"], None),
        ("no such word", ["absent"], "no such word"),
        ("a\n\n  b", ["b"], "a b"),
        ("z" * 500, ["z"], "z" * 90 + "…"),
    ],
)
def test_a_snippet_is_one_line_around_the_word(
    content: str, words: list[str], shown: str | None
) -> None:
    text = snippet(content, words)
    assert "\n" not in text and len(text) <= 92
    assert text == shown if shown is not None else "needle" in text and text[0] == text[-1] == "…"


def test_a_kept_chat_searches_resumes_and_deletes_others(store: SessionStore) -> None:
    filled(store)
    told: list[str] = []
    chat = KeptChat(store, told.append)
    chat.keep(said("this one", "here"), "m")
    rows = chat.searched("list").split("\n")
    assert rows[0].startswith("code  ") and rows[1:] == [
        "    user: Sort a LIST in python",
        "    assistant: Use sorted(list). It is stable: 100% of the time.",
    ]
    assert chat.searched("nowhere") == "nothing is found"
    assert chat.name is not None
    with pytest.raises(UsageError, match="this chat goes on; /clear begins another"):
        chat.delete(chat.name)
    with pytest.raises(UsageError, match="/sessions delete nobody: no chat has this name or id"):
        chat.delete("nobody")
    assert chat.delete("code") == "code"
    assert chat.resume("trip").turns[0].content == "Where is it warm in November?"
    assert chat.name == "trip" and told == []


def test_long_lists_are_cut_and_say_so(store: SessionStore) -> None:
    for number in range(4):
        store.save(Session(), said(*[f"same {number}"] * 5), "m")
    found = store.search(["same"])
    rows = found_rows(found, ["same"], 3)
    assert sum("… 2 more places" in row for row in rows) == 3
    assert rows[-1] == "… 1 more chats"
