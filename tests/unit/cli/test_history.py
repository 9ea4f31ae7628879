"""Typed lines survive the chat, privately, and never disturb it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from chatserve.cli.history import MAX_LINES, HistoryFile


def unexpected(message: str) -> None:
    raise AssertionError(message)


def reload(path: Path) -> list[str]:
    return list(HistoryFile(path, unexpected).load_history_strings())


def test_lines_come_back_newest_first_with_their_newlines(tmp_path: Path) -> None:
    path = tmp_path / "home" / "lines.jsonl"
    history = HistoryFile(path, unexpected)
    history.store_string("first")
    history.store_string("two\nlines 你好")
    assert reload(path) == ["two\nlines 你好", "first"]


def test_file_and_folder_are_private(tmp_path: Path) -> None:
    path = tmp_path / "home" / "lines.jsonl"
    old = os.umask(0)
    try:
        HistoryFile(path, unexpected).store_string("secret")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_line_that_a_crash_cut_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'"whole"\n"cut of\n\xff\xfe\n17\n"last"\n')
    assert reload(path) == ["last", "whole"]


def test_only_the_newest_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(f'"{i}"\n' for i in range(MAX_LINES + 10)))
    lines = reload(path)
    assert len(lines) == MAX_LINES
    assert lines[0] == str(MAX_LINES + 9)


def test_no_file_is_no_history(tmp_path: Path) -> None:
    assert reload(tmp_path / "none") == []


def test_an_unwritable_place_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    warnings: list[str] = []
    history = HistoryFile(tmp_path / "file" / "lines.jsonl", warnings.append)
    history.store_string("one")
    history.store_string("two")
    assert len(warnings) == 1
    assert "cannot write the line history" in warnings[0]


def test_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    warnings: list[str] = []
    assert list(HistoryFile(tmp_path, warnings.append).load_history_strings()) == []
    assert len(warnings) == 1
