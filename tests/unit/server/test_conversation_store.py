"""Conversations of the page on disk: apart, bounded, never overwritten, never lost in silence."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chatserve.errors import StorageFull, StorageUnavailable
from chatserve.server.conversation_store import ChangedElsewhere, ConversationStore

A, B = b"a" * 32, b"b" * 32


def conversation(name: str = "chat-one", revision: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "id": name, "title": "Hello", "revision": revision, "created_at": 1.0, "changed_at": 2.0,
        "models": ["m"], "system": "", "sampling": {}, "heads": ["q"],
        "messages": [{"id": "q", "parent": None, "role": "user", "content": "hello"}],
        **fields,
    }  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "page" / "conversations.db"


@pytest.fixture
def store(path: Path) -> ConversationStore:
    return ConversationStore(path)


def test_nothing_is_made_before_the_first_is_kept(store: ConversationStore, path: Path) -> None:
    assert store.summaries(A) == []
    assert store.find(A, "chat-one") is None
    assert store.votes(A) == []
    store.delete(A, "chat-one")
    store.delete_votes(A)
    assert not path.parent.exists()


def test_all_of_it_comes_back_and_only_its_owner_reads_the_file(
    store: ConversationStore, path: Path
) -> None:
    given = conversation(later={"unknown": [1, "ü\x00", None]})
    summary = store.put(A, given)
    assert summary == {
        "id": "chat-one", "title": "Hello", "revision": 1, "created_at": 1.0, "changed_at": 2.0,
        "models": ["m"],
    }  # fmt: skip
    other = ConversationStore(path)
    assert other.find(A, "chat-one") == {**given, "revision": 1}
    assert other.summaries(A) == [summary]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_owners_see_nothing_of_each_other(store: ConversationStore) -> None:
    store.put(A, conversation(title="of a"))
    store.put(B, conversation(title="of b"))
    store.add_vote(A, {"of": "a"})
    store.delete(B, "chat-one")
    store.delete_votes(B)
    assert [each["title"] for each in store.summaries(A)] == ["of a"]
    assert store.summaries(B) == [] == store.votes(B)
    assert store.find(B, "chat-one") is None
    assert [vote for _, vote in store.votes(A)] == [b'{"of":"a"}']


def test_newest_first_and_found_by_title_and_words(store: ConversationStore) -> None:
    for index, (title, words) in enumerate([("Größe", "x"), ("b", "die GRÖSSE"), ("c", "y")]):
        messages = [{"role": "user", "content": words}]
        name = f"chat-{index:04}"
        store.put(A, conversation(name, title=title, messages=messages, changed_at=float(index)))
    assert [each["title"] for each in store.summaries(A)] == ["c", "b", "Größe"]
    # as Unicode folds it
    assert [each["title"] for each in store.summaries(A, "gröSSe")] == ["b", "Größe"]
    assert store.summaries(A, "%") == []


def test_a_change_on_an_old_revision_is_refused_with_the_newer(store: ConversationStore) -> None:
    store.put(A, conversation())
    newer = store.put(A, conversation(revision=1, title="newer"))
    for revision in (0, 1, 3):
        with pytest.raises(ChangedElsewhere) as refused:
            store.put(A, conversation(revision=revision, title="late"))
        assert refused.value.newer is not None
        assert refused.value.newer["title"] == "newer"
        assert refused.value.newer["revision"] == newer["revision"] == 2


def test_a_change_of_one_that_is_gone_brings_it_not_back(store: ConversationStore) -> None:
    store.put(A, conversation())
    store.delete(A, "chat-one")
    store.delete(A, "chat-one")
    with pytest.raises(ChangedElsewhere) as refused:
        store.put(A, conversation(revision=1))
    assert refused.value.newer is None
    assert store.put(A, conversation())["revision"] == 1


def test_of_two_at_the_same_time_one_is_told(store: ConversationStore, path: Path) -> None:
    store.put(A, conversation())
    stores = [store, ConversationStore(path), store, ConversationStore(path)]
    told: list[str] = []
    ready = threading.Barrier(len(stores))

    def write(number: int, own: ConversationStore) -> None:
        ready.wait(20)
        try:
            own.put(A, conversation(revision=1, title=str(number)))
        except ChangedElsewhere:
            told.append("late")
        else:
            told.append("kept")

    threads = [threading.Thread(target=write, args=each) for each in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(told) == ["kept", "late", "late", "late"]
    assert store.summaries(A)[0]["revision"] == 2


def test_too_many_are_refused_and_none_is_lost(path: Path) -> None:
    store = ConversationStore(path, max_own_conversations=2)
    for name in ("chat-one", "chat-two"):
        store.put(A, conversation(name))
    with pytest.raises(StorageFull, match="2 conversations are kept, which is all"):
        store.put(A, conversation("chat-three"))
    assert len(store.summaries(A)) == 2
    store.put(A, conversation(revision=1))  # one that is there may change
    store.put(B, conversation("chat-three"))
    store.add_vote(A, {})
    store.delete(A, "chat-two")
    store.put(A, conversation("chat-three"))


def test_too_large_together_is_refused(path: Path) -> None:
    store = ConversationStore(path, max_own_bytes=3000)
    store.put(A, conversation(text="x" * 2000))
    with pytest.raises(StorageFull, match=r"the limit is 3,000; delete some"):
        store.put(A, conversation("chat-two", text="x" * 2000))
    with pytest.raises(StorageFull):
        store.add_vote(A, {"text": "x" * 2000})
    # in its own place there is room
    assert store.put(A, conversation(revision=1, text="y" * 2000))["revision"] == 2
    with pytest.raises(StorageFull):
        store.put(A, conversation(revision=2, text="y" * 4000))
    found = store.find(A, "chat-one")
    assert found is not None and found["text"] == "y" * 2000


def test_all_owners_have_a_bound_together(path: Path) -> None:
    store = ConversationStore(path, max_own_bytes=3000, max_bytes=5000)
    store.put(A, conversation(text="x" * 2000))
    store.put(B, conversation(text="x" * 2000))
    with pytest.raises(StorageFull, match="for all its users"):
        store.put(b"c", conversation(text="x" * 2000))


def test_what_was_deleted_is_not_in_the_file(store: ConversationStore, path: Path) -> None:
    store.put(A, conversation(title="CANARY-5521"))
    store.add_vote(A, {"of": "CANARY-5521"})
    store.delete(A, "chat-one")
    store.delete_votes(A)
    files = list(path.parent.iterdir())
    assert files
    assert not any(b"CANARY-5521" in file.read_bytes() for file in files)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff" * 4096)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [overwrite, cut])
def test_a_damaged_file_is_put_aside_as_it_is(
    damage: Callable[[Path], None], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ConversationStore(path)
    store.put(A, conversation())
    damage(path)
    before = path.read_bytes()
    assert store.summaries(A) == []
    (aside,) = path.parent.glob("conversations.db.damaged-*[0-9]")
    assert aside.read_bytes() == before
    assert str(aside) in caplog.text
    assert store.put(A, conversation("chat-two"))["revision"] == 1
    assert aside.read_bytes() == before


def test_a_file_of_a_newer_version_is_left_alone(store: ConversationStore, path: Path) -> None:
    store.put(A, conversation())
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    with pytest.raises(StorageUnavailable, match="a newer chatserve has written it"):
        store.put(A, conversation("chat-two"))
    assert path.read_bytes() == before


def test_a_disk_without_room(store: ConversationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's own limit on pages fails as a full disk does, with the same code."""
    store.put(A, conversation())
    refuse_newer = store._database._refuse_newer

    def small(connection: sqlite3.Connection) -> int:
        (number,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {number}")
        return refuse_newer(connection)

    monkeypatch.setattr(store._database, "_refuse_newer", small)
    with pytest.raises(StorageFull, match=r"\(database or disk is full\); let the browser"):
        store.put(A, conversation("chat-two", text="x" * 100_000))
    assert [each["id"] for each in store.summaries(A)] == ["chat-one"]
    monkeypatch.undo()
    store.put(A, conversation("chat-two", text="x" * 100_000))


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT"])
def test_a_folder_that_cannot_be_made_for_want_of_room(
    code: str, store: ConversationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def mkdir(*_: object, **__: object) -> None:
        raise OSError(getattr(errno, code), "no room")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(StorageFull, match="no room"):
        store.put(A, conversation())


def test_a_read_only_disk(
    store: ConversationStore, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the log is told where the file is."""
    store.put(A, conversation())
    path.chmod(0o644)
    with pytest.raises(StorageUnavailable) as failed:
        store.put(A, conversation("chat-two"))
    assert "others than its owner may read it" in failed.value.message
    assert str(path) not in failed.value.message
    assert str(path) in caplog.text
