"""Chats on disk: what was saved comes back, nobody else reads it, damage is put aside."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chatserve import private_database
from chatserve.cli import session_store
from chatserve.cli.kept_chat import KeptChat
from chatserve.cli.session_store import Session, SessionStore
from chatserve.cli.transcript import Transcript, Turn
from chatserve.errors import UsageError
from chatserve.private_database import (
    Damaged,
    DatabaseFailed,
    PrivateDatabase,
    ReplaceableDatabase,
)

FULL, WAL = 2, "wal"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "chats" / "chats.db"


@pytest.fixture
def store(path: Path) -> SessionStore:
    times = iter(range(1000, 2000))
    return SessionStore(path, clock=lambda: next(times))


def said(*texts: str, **more: str) -> Transcript:
    roles = ("user", "assistant") * len(texts)
    return Transcript(turns=[Turn(*pair) for pair in zip(roles, texts, strict=False)], **more)


def kept(store: SessionStore, *texts: str) -> Session:
    session = Session()
    assert store.save(session, said(*texts), "m")
    return session


def texts(store: SessionStore, wanted: str) -> list[str]:
    found = store.find(wanted)
    assert found is not None
    return [turn.content for turn in found[1].turns]


def test_a_chat_comes_back_as_it_was(store: SessionStore, path: Path) -> None:
    transcript = said("hello", "你好\n\x1b[2J \x00", system="be brief", template_name="vicuna_v1.1")
    transcript.roles, transcript.offset = ("H", "A"), 1
    transcript.ask("more?")
    transcript.answer("half an", is_partial=True)
    session = Session()
    assert store.save(session, transcript, "fake-1b")
    found = SessionStore(path).find(session.id)
    assert found is not None and found[1] == transcript


def test_only_the_owner_can_read_it_whatever_the_umask(store: SessionStore, path: Path) -> None:
    old = os.umask(0)
    try:
        kept(store, "secret")
        with closing(sqlite3.connect(path)) as other:  # so that the journal stays
            other.execute("SELECT * FROM turns").fetchall()
            kept(store, "secret, too")
            files = sorted(path.parent.iterdir())
            assert [file.name for file in files] == [
                "chats.db", "chats.db-shm", "chats.db-wal", "lock"
            ]  # fmt: skip
            assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700


def test_a_folder_that_others_could_read_is_closed(store: SessionStore, path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.parent.chmod(0o755)
    kept(store, "secret")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_file_that_others_could_read_is_refused(store: SessionStore, path: Path) -> None:
    kept(store, "secret")
    path.chmod(0o644)
    told: list[str] = []
    KeptChat(store, told.append)
    assert told == [
        f"this chat goes on, but is not kept: {path}: others than its owner may read it "
        "(mode 644); chmod 600 it"
    ]


def test_what_is_saved_is_on_the_disk(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each transaction in a journal that is synced: PRAGMA synchronous is FULL, not NORMAL."""
    seen = []
    refuse_newer = ReplaceableDatabase._refuse_newer

    def looking(self: ReplaceableDatabase, connection: sqlite3.Connection) -> int:
        seen.append([connection.execute(f"PRAGMA {name}").fetchone()[0]
                     for name in ("synchronous", "journal_mode")])  # fmt: skip
        return refuse_newer(self, connection)

    monkeypatch.setattr(ReplaceableDatabase, "_refuse_newer", looking)
    kept(store, "a")
    assert seen == [[FULL, WAL]]
    careless = PrivateDatabase(store.path, session_store._SCHEMA)
    with closing(careless), careless.reading() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone()[0] != FULL


def test_only_what_changed_is_written(store: SessionStore, path: Path) -> None:
    session, transcript = Session(), said("1", "one", "2", "two")
    store.save(session, transcript, "m")
    transcript.remove_last()
    transcript.ask("3")
    transcript.answer("three", is_partial=False)
    store.save(session, transcript, "m")
    assert texts(store, session.id) == ["1", "one", "3", "three"]
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT place, saved_at FROM turns ORDER BY place").fetchall()
    assert rows == [(0, 1000), (1, 1000), (2, 1001), (3, 1001)]


def test_a_chat_is_found_by_id_its_beginning_its_name_or_as_the_last(store: SessionStore) -> None:
    first, second = Session("abcdef01"), Session("abcdff02")
    store.save(first, said("first"), "m")
    store.save(second, said("second"), "m")
    assert store.rename(first, "holiday")
    assert not store.rename(second, "holiday"), "the name is taken"
    assert not store.rename(Session(), "nobody"), "there is no such chat"
    for wanted in ("abcdef01", "abcde", "holiday"):
        assert texts(store, wanted) == ["first"]
    assert texts(store, "last") == ["second"]
    for wanted in ("abcd", "ab", "", "none", "%", "abcdef01x"):
        assert store.find(wanted) is None
    assert [(info.name, info.title, info.num_turns) for info in store.recent(5)] == [
        (None, "second", 1), ("holiday", "first", 1)
    ]  # fmt: skip
    assert store.recent(1)[0].id == second.id


def test_a_chat_without_turns_is_not_the_last(store: SessionStore) -> None:
    first = kept(store, "first")
    second = kept(store, "second")
    store.save(second, said(), "m")
    assert store.find("last") == store.find(first.id)
    assert [info.id for info in store.recent(5)] == [first.id]


def test_two_terminals_in_one_chat_lose_nothing(store: SessionStore, path: Path) -> None:
    session = kept(store, "q", "a")
    told: list[list[str]] = [[], []]
    stores = [SessionStore(path), SessionStore(path)]
    chats = [KeptChat(each, lines.append) for each, lines in zip(stores, told, strict=True)]
    transcripts = [chat.resume(session.id) for chat in chats]
    for round_ in range(2):
        for index, (chat, transcript) in enumerate(zip(chats, transcripts, strict=True)):
            transcript.ask(f"{index} {round_}")
            chat.keep(transcript, "m")
    names = [chat.name for chat in chats]
    assert names[0] == session.id != names[1]
    assert told == [
        [], [f"{session.id} was gone on with elsewhere: this chat is kept as {names[1]}"]
    ]  # fmt: skip
    for index, name in enumerate(names):
        assert texts(store, str(name)) == ["q", "a", f"{index} 0", f"{index} 1"]


def test_a_save_that_was_interrupted_after_it_was_done_is_no_other_terminal(
    store: SessionStore,
) -> None:
    told: list[str] = []
    chat, transcript = KeptChat(store, told.append), said("q", "a")
    save = store.save

    def interrupted(*arguments: object) -> bool:
        session: Session = arguments[0]  # type: ignore[assignment]
        save(Session(session.id), *arguments[1:])  # type: ignore[arg-type]
        raise KeyboardInterrupt

    store.save = interrupted  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        chat.keep(transcript, "m")
    store.save = save  # type: ignore[method-assign]
    chat.keep(transcript, "m")
    assert told == []
    assert [info.id for info in store.recent(5)] == [chat.name]


def test_a_file_of_a_newer_version_is_left_alone(store: SessionStore, path: Path) -> None:
    kept(store, "old")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {session_store.VERSION + 1}")
    before = path.read_bytes()
    with pytest.raises(DatabaseFailed, match="a newer chatserve has written it"):
        kept(store, "new")
    assert path.read_bytes() == before


def test_half_a_surrogate_pair_that_was_typed_is_kept_as_one_that_cannot_be_read(
    store: SessionStore,
) -> None:
    session = kept(store, "a\udcff b\ud83d")
    assert texts(store, session.id) == ["a\ufffd b\ufffd"]


def truncate(size: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size(path.stat().st_size))


def overwrite(offset: int, data: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return damage


def lose_all_but_the_journal(path: Path) -> None:
    os.truncate(path, 0)
    path.with_name(path.name + "-wal").write_bytes(b"7\x7f\x06\x82" * 100)


DAMAGES = {
    "half": truncate(lambda size: size // 2),
    "a page less": truncate(lambda size: size - 4096),
    "a byte less": truncate(lambda size: size - 1),
    "a page": truncate(lambda _: 4096),
    "a header": truncate(lambda _: 100),
    "a byte": truncate(lambda _: 1),
    "junk": overwrite(0, b"\xff" * 4096),
    "junk inside": overwrite(4096, b"\xff" * 4096),
    "journal only": lose_all_but_the_journal,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_put_aside_as_it_is_and_a_new_one_begun(
    damage: Callable[[Path], None], store: SessionStore, path: Path
) -> None:
    session = kept(store, *(f"turn {index} " + "word " * 300 for index in range(20)))
    damage(path)
    before = path.read_bytes()
    told: list[str] = []
    chat = KeptChat(store, told.append)
    (aside,) = path.parent.glob("chats.db.damaged-*[0-9]")
    assert aside.read_bytes() == before
    assert len(told) == 1
    assert "\n" not in told[0] and str(aside) in told[0]
    chat.keep(said("new", "turn"), "m")
    assert len(told) == 1
    assert chat.name is not None and texts(store, chat.name) == ["new", "turn"]
    assert store.find(session.id) is None
    with pytest.raises(UsageError, match=f"--resume {session.id}: no chat has this name or id; "):
        chat.resume(session.id)


def test_a_file_that_is_damaged_while_chats_go_on_with_it(store: SessionStore, path: Path) -> None:
    """The first that sees it puts it aside; both go on with all their turns in the new one."""
    told: list[str] = []
    chats = [KeptChat(SessionStore(path), told.append) for _ in range(2)]
    transcripts = [said(f"{index}", "a") for index in range(2)]
    for _ in range(2):
        for chat, transcript in zip(chats, transcripts, strict=True):
            transcript.ask("more")
            chat.keep(transcript, "m")
        if not told:
            overwrite(0, b"\xff" * 4096)(path)
    assert len(told) == 1 and "damaged" in told[0]
    for index, chat in enumerate(chats):
        assert texts(store, str(chat.name)) == [f"{index}", "a", "more", "more"]


def test_nothing_that_was_put_aside_is_replaced(store: SessionStore, path: Path) -> None:
    store = SessionStore(path, clock=lambda: 1.0)
    asides = set()
    for index in range(3):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"no database {index}" * 50)
        path.chmod(0o600)
        asides.add(store.put_aside())
    assert len(asides) == 3
    assert {aside.read_text()[:13] for aside in asides if aside} == {
        f"no database {index}" for index in range(3)
    }


def test_a_whole_file_is_not_put_aside(store: SessionStore, path: Path) -> None:
    kept(store, "a")
    assert store.put_aside() is None
    assert path.exists()


def test_nothing_is_made_before_there_is_a_turn(store: SessionStore, path: Path) -> None:
    chat = KeptChat(store, pytest.fail)
    chat.keep(Transcript(system="be brief"), "m")
    assert chat.name is None and chat.listed() == "no chat is kept yet"
    assert chat.rename("x") == "nothing of this chat is kept yet; ask something first"
    assert not path.parent.parent.exists()


def test_a_place_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "data" / "chats" / "chats.db"
    told: list[str] = []
    chat, transcript = KeptChat(SessionStore(path), told.append), said("q", "a")
    for _ in range(3):
        transcript.ask("more")
        chat.keep(transcript, "m")
    assert told == [f"this chat goes on, but is not kept: {path}: Not a directory"]
    assert chat.name is None
    assert chat.listed() == "no chat is kept yet"
    with pytest.raises(UsageError, match=r"chats\.db holds none yet"):
        chat.resume("last")


def test_a_disk_that_was_full_for_a_while_has_all_turns_in_the_end(
    store: SessionStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    chat, transcript = KeptChat(store, told.append), said("q", "a")
    with monkeypatch.context() as patch:

        def full(*_: object) -> bool:
            raise DatabaseFailed("database or disk is full")

        patch.setattr(store, "save", full)
        for _ in range(2):
            transcript.ask("more")
            chat.keep(transcript, "m")
    assert len(told) == 1 and "database or disk is full" in told[0]
    chat.keep(transcript, "m")
    assert texts(store, str(chat.name)) == ["q", "a", "more", "more"]


@pytest.fixture
def stopped(path: Path, store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another chat that was stopped while it had the file open."""
    monkeypatch.setattr(private_database, "_ALONE_S", 0.02)
    kept(store, "a")
    with SessionStore(path)._database.held():
        yield


@pytest.mark.usefixtures("stopped")
def test_a_file_that_another_chat_has_open_stays_where_it_is(
    store: SessionStore, path: Path
) -> None:
    overwrite(0, b"\xff" * 4096)(path)
    told: list[str] = []
    KeptChat(store, told.append)
    assert len(told) == 1 and "is not kept" in told[0]
    assert path.exists()


def test_damage_that_is_found_late(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where it is so again in the new file, the chat goes on."""
    told: list[str] = []
    chat = KeptChat(store, told.append)

    def damaged(*_: object) -> bool:
        raise Damaged("malformed")

    monkeypatch.setattr(store, "save", damaged)
    monkeypatch.setattr(store, "put_aside", lambda: Path("aside"))
    chat.keep(said("q", "a"), "m")
    assert len(told) == 2
    assert "damaged (malformed)" in told[0] and "is not kept" in told[1]


@pytest.mark.parametrize(
    ("platform", "variables", "folder"),
    [
        ("linux", {}, ".local/share/chatserve"),
        ("linux", {"XDG_DATA_HOME": "/data"}, "/data/chatserve"),
        ("darwin", {}, "Library/Application Support/chatserve"),
        ("darwin", {"CHATSERVE_HOME": "/home"}, "/home"),
    ],
)
def test_chats_lie_where_data_lies_and_not_in_a_cache(
    platform: str, variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CHATSERVE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", platform)
    assert SessionStore.of_user().path == Path.home() / folder / "chats" / "chats.db"


def test_a_journal_that_another_chat_takes_away_meanwhile_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SessionStore(tmp_path / "chats" / "chats.db")
    transcript = Transcript()
    transcript.ask("hello")
    transcript.answer("hi", is_partial=False)
    store.save(Session("a"), transcript, "m")
    journal = store.path.with_name(store.path.name + "-wal")
    journal.write_bytes(b"\0" * 32)
    look = Path.stat

    def stat_and_lose(path: Path, **options: Any) -> os.stat_result:
        found = look(path, **options)
        if path == journal:
            journal.unlink()
        return found

    monkeypatch.setattr(Path, "stat", stat_and_lose)
    assert [info.title for info in store.recent(5)] == ["hello"]
