"""The turns of a conversation and FastChat's file of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from chatserve.cli.transcript import Transcript, Turn
from chatserve.errors import UsageError


def talk(*pairs: tuple[str, str]) -> Transcript:
    transcript = Transcript()
    for question, answer in pairs:
        transcript.ask(question)
        transcript.answer(answer, is_partial=False)
    return transcript


def test_messages_are_the_whole_conversation_with_the_system_message_first() -> None:
    transcript = talk(("hi", "hello"))
    transcript.system = "be brief"
    transcript.ask("and now?")
    assert transcript.messages() == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "and now?"},
    ]


def test_without_history_only_system_and_last_question_are_sent() -> None:
    transcript = talk(("hi", "hello"))
    transcript.system = "be brief"
    transcript.ask("and now?")
    assert [m["content"] for m in transcript.messages(with_history=False)] == [
        "be brief",
        "and now?",
    ]


def test_a_partial_answer_is_sent_and_a_question_without_any_answer_is_not() -> None:
    transcript = Transcript()
    transcript.ask("stopped early")
    transcript.answer("", is_partial=True)
    transcript.ask("stopped late")
    transcript.answer("half an", is_partial=True)
    transcript.ask("third")
    assert [m["content"] for m in transcript.messages()] == ["stopped late", "half an", "third"]


def test_remove_last_takes_question_and_answer() -> None:
    transcript = talk(("a", "1"), ("b", "2"))
    assert transcript.remove_last()
    assert transcript.turns == [Turn("user", "a"), Turn("assistant", "1")]
    assert transcript.remove_last()
    assert not transcript.remove_last()


def test_take_last_question_forgets_the_answer_also_when_it_was_stopped_early() -> None:
    transcript = talk(("a", "1"))
    transcript.ask("b")
    transcript.answer("", is_partial=True)
    assert transcript.take_last_question() == "b"
    assert transcript.turns == talk(("a", "1")).turns
    assert Transcript().take_last_question() is None


def test_take_last_question_keeps_an_answer_that_has_no_question() -> None:
    transcript = Transcript(turns=[Turn("assistant", "greeting")])
    assert transcript.take_last_question() is None
    assert transcript.turns == [Turn("assistant", "greeting")]


def test_examples_of_a_template_are_sent_but_never_removed() -> None:
    transcript = talk(("example", "answer"))
    transcript.offset = 2
    assert not transcript.remove_last()
    assert transcript.take_last_question() is None
    transcript.ask("mine")
    assert [m["content"] for m in transcript.messages()] == ["example", "answer", "mine"]


def test_reset_keeps_the_system_message() -> None:
    transcript = talk(("a", "1"))
    transcript.system = "be brief"
    transcript.reset()
    assert (transcript.turns, transcript.system) == ([], "be brief")


def test_a_file_of_fastchat_is_read_and_written_back_unchanged(tmp_path: Path) -> None:
    table = {
        "template_name": "vicuna_v1.1",
        "system_message": "A chat between a curious user and an assistant.",
        "roles": ["USER", "ASSISTANT"],
        "messages": [["USER", "你好"], ["ASSISTANT", "Hi\nthere"], ["USER", "bye"]],
        "offset": 0,
    }
    (tmp_path / "chat.json").write_text(json.dumps(table), "utf-8")
    transcript = Transcript.load(str(tmp_path / "chat.json"))
    assert transcript.turns == [
        Turn("user", "你好"),
        Turn("assistant", "Hi\nthere"),
        Turn("user", "bye"),
    ]
    assert transcript.save(str(tmp_path / "again")) == (tmp_path / "again.json", False)
    assert transcript.save(str(tmp_path / "again")) == (tmp_path / "again.json", True)
    assert json.loads((tmp_path / "again.json").read_text("utf-8")) == table
    assert Transcript.load(str(tmp_path / "again")) == transcript


def test_an_answer_that_fastchat_had_not_begun_is_empty(tmp_path: Path) -> None:
    table = {"roles": ["Human", "Assistant"], "messages": [["Human", "q"], ["Assistant", None]]}
    (tmp_path / "chat.json").write_text(json.dumps(table), "utf-8")
    transcript = Transcript.load(str(tmp_path / "chat.json"))
    assert transcript.turns == [Turn("user", "q"), Turn("assistant", "", is_partial=True)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        "[" * 100_000,
        '{"roles": ["A"], "messages": []}',
        '{"roles": ["A", "B"], "messages": [["C", "hi"]]}',
        '{"roles": ["A", "B"], "messages": [["A"]]}',
        '{"roles": ["A", "B"], "messages": [["A", 5]]}',
        '{"roles": ["A", "B"], "messages": 7}',
        '{"roles": ["A", "B"], "messages": [], "offset": "x"}',
        '{"roles": ["A", "B"], "messages": [], "offset": 1e999}',
        '{"roles": ["A", "B"], "messages": [], "system_message": ["x"]}',
    ],
)
def test_a_file_that_is_no_conversation_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UsageError, match=r"bad\.json"):
        Transcript.load(str(tmp_path / "bad.json"))


def test_missing_binary_and_huge_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="No such file"):
        Transcript.load(str(tmp_path / "none"))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"cannot load .*: it is no JSON that /save or FastChat"):
        Transcript.load(str(tmp_path / "binary.json"))
    monkeypatch.setattr("chatserve.cli.transcript.MAX_FILE_BYTES", 2)
    with pytest.raises(UsageError, match="over 2 bytes"):
        Transcript.load(str(tmp_path / "binary.json"))


def test_a_failed_save_names_the_reason_and_leaves_the_old_file(tmp_path: Path) -> None:
    old, _ = talk(("a", "1")).save(str(tmp_path / "chat"))
    before = old.read_bytes()
    with pytest.raises(UsageError, match="cannot save"):
        talk(("a", "lone surrogate \ud800")).save(str(old))
    assert old.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]
    with pytest.raises(UsageError, match="No such file or directory"):
        talk(("a", "1")).save(str(tmp_path / "missing" / "chat"))


def test_names_that_no_file_can_have_are_refused() -> None:
    for name in ("~nosuchuser/x", "x" * 300, "x\0y", ".", "/"):
        with pytest.raises(UsageError, match="cannot load"):
            Transcript.load(name)
        with pytest.raises(UsageError, match="cannot save"):
            talk(("a", "1")).save(name)


def test_what_has_no_end_is_not_loaded(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(UsageError, match="it is no file"):
            Transcript.load(name)
