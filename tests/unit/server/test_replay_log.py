"""The log keeps what it takes to repeat an answer: privately, and no more than it has room for."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest

from chatserve.errors import CannotWrite, UsageError
from chatserve.server.replay_log import LoggedAnswer, ReplayLog, find, newest


def answer(name: str, num_ids: int = 3, choice: int = 0) -> LoggedAnswer:
    return LoggedAnswer(
        name, choice, 1_700_000_000, "tiny", None, "fp_1", prompt_ids=[1, 2, 3],
        sampling={"seed": -5, "logit_bias": {7: -100.0}}, grammar=None,
        token_ids=[4] * num_ids, finish_reason="stop",
    )  # fmt: skip


def write(path: Path, *answers: LoggedAnswer, **limits: int) -> None:
    with closing(ReplayLog(path, **limits)) as log:
        for each in answers:
            log.add(each)


def names(path: Path) -> list[str]:
    return [each.id for each in newest(path, 1000)]


def test_what_is_written_is_found(tmp_path: Path) -> None:
    path = tmp_path / "home" / "replay.db"
    write(path, answer("a"), answer("b"))
    [found] = find(path, "a")
    assert found.sampling == {"seed": -5, "logit_bias": {"7": -100.0}}
    assert (found.id, found.token_ids) == ("a", [4, 4, 4])
    assert find(path, "c") == []
    assert names(path) == ["b", "a"]
    assert [each.id for each in newest(path, 1)] == ["b"]


def test_choices_and_prompts_of_one_answer(tmp_path: Path) -> None:
    path = tmp_path / "replay.db"
    parts = [answer("a-0"), answer("a-0", choice=1), answer("a-1"), answer("ab"), answer("a-x")]
    write(path, *parts, answer("a-0"))
    assert [(each.id, each.choice) for each in find(path, "a")] == [
        ("a-0", 1), ("a-1", 0), ("a-0", 0),
    ]  # fmt: skip


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "replay.db"
    old = os.umask(0)
    try:
        with closing(ReplayLog(path)) as log:
            log.add(answer("a"))
        with closing(sqlite3.connect(path)) as database:
            database.execute("DELETE FROM answers")
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    finally:
        os.umask(old)
    assert set(modes) >= {"replay.db", "replay.db-wal"}
    assert set(modes.values()) == {0o600}


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "replay.db"
    write(path, answer("a"))
    path.chmod(0o640)
    with pytest.raises(UsageError, match=r"others than its owner may read it \(mode 640\)"):
        ReplayLog(path)
    with pytest.raises(UsageError, match=r"\(mode 640\); chmod 600 it, or remove it"):
        newest(path, 1)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    (tmp_path / "replay.db").symlink_to(target)
    with pytest.raises(CannotWrite, match="set CHATSERVE_HOME"):
        ReplayLog(tmp_path / "replay.db")
    assert not target.exists()


def test_the_oldest_answers_go_by_number(tmp_path: Path) -> None:
    path = tmp_path / "replay.db"
    write(path, *(answer(str(i)) for i in range(7)), max_answers=4)
    assert names(path) == ["6", "5", "4", "3"]


def test_the_oldest_answers_go_by_bytes(tmp_path: Path) -> None:
    path = tmp_path / "replay.db"
    size = len(answer("0", 1000).to_json())
    write(path, *(answer(str(i), 1000) for i in range(7)), max_bytes=3 * size)
    assert names(path) == ["6", "5", "4"]
    write(path, answer("7", 10), max_bytes=3 * size)
    assert names(path) == ["7", "6", "5"]
    write(path, answer("8", 4000), max_bytes=3 * size)  # larger than all there is room for
    assert names(path) == ["7", "6", "5"]


def test_two_workers_share_one_log(tmp_path: Path) -> None:
    path = tmp_path / "replay.db"
    with closing(ReplayLog(path)) as first, closing(ReplayLog(path)) as second:
        for i in range(20):
            first.add(answer(f"first-{i}"))
            second.add(answer(f"second-{i}"))
    assert len(names(path)) == 40


def test_a_disk_that_fails_costs_no_answer_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "replay.db"
    with closing(ReplayLog(path)) as log:
        with closing(sqlite3.connect(path)) as database:
            database.execute("DROP TABLE answers")
        log.add(answer("a"))
        log.add(answer("b"))
    assert [record.getMessage() for record in caplog.records] == [
        "a and perhaps more is not in the replay log: no such table: answers"
    ]


def test_an_answer_that_cannot_be_written_costs_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = dataclasses.replace(answer("odd"), sampling={"seed": object()})
    write(tmp_path / "replay.db", odd, answer("a"))
    assert names(tmp_path / "replay.db") == ["a"]
    assert "odd and perhaps more is not in the replay log: TypeError" in caplog.text


def test_a_file_that_is_no_database_is_told_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "replay.db"
    path.touch(0o600)
    path.write_bytes(b"not a database, but long enough to look at" * 50)
    with pytest.raises(CannotWrite, match=r"\(file is not a database\); remove it"):
        ReplayLog(path)


def test_a_queue_that_is_full_drops_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = ReplayLog(tmp_path / "replay.db")
    log.close()  # nobody takes anything out any more
    for i in range(1001):
        log.add(answer(str(i)))
    assert "1000 and perhaps more is not in the replay log: the disk is too slow" in caplog.text


@pytest.mark.parametrize("content", [b"", b"not a database, but long enough to look at" * 50])
def test_what_is_no_log_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "replay.db"
    with pytest.raises(UsageError, match="there is no replay log"):
        find(path, "a")
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(UsageError, match="cannot be read as a replay log"):
        newest(path, 1)
