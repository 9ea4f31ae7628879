"""`chatserve history`: kept chats listed, searched, shown, exported and deleted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatserve.cli.commands.history import main
from chatserve.cli.kept_chat import row
from chatserve.cli.session_store import Session, SessionInfo, SessionStore
from chatserve.cli.transcript import Transcript, Turn
from chatserve.errors import UsageError


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SessionStore:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path))
    store = SessionStore.of_user()
    turns = [Turn("user", "Where to go?\x1b[2J"), Turn("assistant", "To *Madeira*.", True)]
    session = Session()
    store.save(session, Transcript("be brief", turns), "fake-1b")
    assert store.rename(session, "trip")
    store.save(Session("c0de0001"), Transcript(None, [Turn("user", "Sort this")]), "fake-1b")
    return store


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main([*argv]) == 0
    return capsys.readouterr().out


def test_the_newest_come_first(store: SessionStore, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line.split("  ") for line in output(capsys).splitlines()]
    assert [(row[0], row[2]) for row in rows] == [
        ("c0de0001", "Sort this"),
        ("trip", "Where to go?"),
    ]
    assert output(capsys, "--most", "1").count("\n") == 1


def test_words_may_stand_anywhere(store: SessionStore, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "MADEIRA", "--most", "5", "to").splitlines()
    assert lines[0].startswith("trip  ") and lines[1:] == ["    assistant: To *Madeira*."]
    assert output(capsys, "madeira go") == ""


def test_json_of_lists_finds_and_chats(
    store: SessionStore, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(*argv: str) -> Any:
        return json.loads(output(capsys, "--json", *argv))

    assert [(chat["name"], chat["model"], chat["num_turns"]) for chat in read()] == [
        (None, "fake-1b", 1), ("trip", "fake-1b", 2)
    ]  # fmt: skip
    (found,) = read("madeira")
    assert found["found"] == [{"place": 1, "role": "assistant", "snippet": "To *Madeira*."}]
    assert read("nowhere") == []
    chat = read("--show", "trip")
    assert (chat["name"], chat["model"], chat["system"]) == ("trip", "fake-1b", "be brief")
    assert chat["turns"][1] == {"role": "assistant", "content": "To *Madeira*.", "is_partial": True}


def test_a_chat_in_json_is_ascii_so_that_no_terminal_obeys_it(
    store: SessionStore, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "\x1b[2J \x9b2J \x7f \u202e 你"
    store.save(Session("c0de0002"), Transcript(None, [Turn("user", said)]), "fake-1b")
    text = output(capsys, "--show", "c0de0002", "--json")
    assert text.replace("\n", "").isascii() and text.replace("\n", "").isprintable()
    assert json.loads(text)["turns"][0]["content"] == said


def test_a_chat_is_shown_as_markdown_without_its_escapes(
    store: SessionStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert output(capsys, "--show", "trip") == (
        "# trip\n\nModel: `fake-1b`\n\n## System\n\nbe brief\n\n"
        "## Question\n\nWhere to go?\n\n## Answer (broke off)\n\nTo *Madeira*.\n"
    )


def test_a_chat_is_exported_in_the_form_that_the_name_says(
    store: SessionStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trip.json"
    assert output(capsys, "--show", "trip", "--output", str(file)) == f"exported to {file}\n"
    assert json.loads(file.read_text())["messages"][0] == {"role": "system", "content": "be brief"}
    assert output(capsys, "--show", "trip", "--output", str(file)) == f"replaced {file}\n"
    page = tmp_path / "trip.html"
    assert output(capsys, "--show", "trip", "--output", str(page)) == f"exported to {page}\n"
    assert "<p>To <em>Madeira</em>.</p>" in page.read_text()
    with pytest.raises(UsageError, match=r"must end in \.md"):
        main(["--show", "trip", "--output", str(tmp_path / "trip.pdf")])


def test_a_chat_is_deleted(store: SessionStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "--delete", "trip") == "deleted trip\n"
    assert store.find("trip") is None and store.find("c0de0001") is not None
    with pytest.raises(UsageError, match="--delete trip: no chat has this name or id"):
        main(["--delete", "trip"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--show", "a", "--delete", "b"], "--show and --delete are two things"),
        (["--delete", "a", "word"], "--delete and a search are two things"),
        (["--output", "a.md"], "--output is for the chat that --show names"),
        (["--show", "none"], "--show none: no chat has this name or id; the newest are"),
        (["--most", "0"], "out of range"),
    ],
)
def test_mistakes_are_named(argv: list[str], message: str, store: SessionStore) -> None:
    with pytest.raises(UsageError, match=message):
        main(argv)


def test_no_name_writes_escapes(store: SessionStore, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session()
    store.save(session, Transcript(None, [Turn("user", "Sort\x1b[2J that")]), "fake-1b")
    store.rename(session, "evil\x1b]0;owned\x07")
    for argv in ([], ["sort"], ["--show", "evil\x1b]0;owned\x07"], ["--delete", session.id]):
        text = output(capsys, *argv)
        assert "evil" in text and "\x1b" not in text and "\x07" not in text


def test_nothing_there_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "empty"))
    assert main([]) == 0 and main(["word"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("no chat is kept yet in ") and "nothing is found" in err
    assert not (tmp_path / "empty").exists()


def test_a_file_that_cannot_be_read_is_named(store: SessionStore) -> None:
    store.path.chmod(0o644)
    with pytest.raises(UsageError, match=r"cannot read .*chats\.db .*others than its owner"):
        main([])


@pytest.mark.parametrize(
    ("title", "shown"), [("a" * 40, "a" * 40), ("a" * 41, "a" * 39 + "…"), ("a\x1b[2J\nb", "a b")]
)
def test_a_title_that_is_cut_says_so(title: str, shown: str) -> None:
    line = row(SessionInfo("c0de", "trip", title, 0.0, 2))
    assert line.startswith("trip  ") and line.endswith(f"  {shown}")
