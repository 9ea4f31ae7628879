"""JSONL and the published Parquet: a question a row; what is broken is told with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from chatserve.train.data import lines, rows
from chatserve.train.data.records import Answer, BadSource, Credit, Question, decode, encode
from chatserve.train.data.rows import Row, read_jsonl, read_parquet
from tests.posts import jsonl, row

ADDRESS = "https://ai.example.com/questions/1"
PUBLISHED = {
    "qid": 1,
    "question": "<p>why?</p>",
    "answers": [
        {
            "answer_id": 3, "author": "Ada", "author_id": 10, "pm_score": "2", "selected": True,
            "author_profile": "https://ai.example.com/users/10", "text": "<p>so</p>",
        }
    ],
    "date": "2016/08/02",
    "metadata": [ADDRESS, "https://ai.example.com", "https://ai.example.com/users/8/"],
}  # fmt: skip


def parquet(path: Path, table: list[dict[str, Any]], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path, **options)
    return path


def faults(found: list[Row]) -> list[tuple[str, str | None]]:
    return [(each.where, each.fault) for each in found if each.fault is not None]


def test_the_published_columns(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [PUBLISHED])
    (found,) = read_parquet(path, "CC BY-SA 4.0")
    credit = Credit(ADDRESS, None, None, "CC BY-SA 4.0")
    by = Credit(f"{ADDRESS}#3", "Ada", "https://ai.example.com/users/10", "CC BY-SA 4.0")
    expected = (
        Question("ai.example.com/1", "<p>why?</p>", None, credit),
        Answer("ai.example.com/1", "3", "<p>so</p>", None, 2, True, by),
    )
    assert found.records == expected
    assert tuple(decode(map(encode, expected))) == expected


def test_jsonl_has_the_same_columns(tmp_path: Path) -> None:
    (from_lines,) = read_jsonl(jsonl(tmp_path / "a.jsonl", [PUBLISHED]), "CC BY-SA 4.0")
    (from_table,) = read_parquet(parquet(tmp_path / "a.parquet", [PUBLISHED]), "CC BY-SA 4.0")
    assert from_lines.records == from_table.records


def test_each_broken_line_is_one_fault(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        [
            row(1, 3, 1),
            '{"qid": 2, "question": ',
            "[1]",
            '{"qid": 3, "question": "\\ud800", "answers": []}',
            row(4, 1, question=7),
            {"qid": 5, "question": "a"},
            {**row(6, 1), "qid": 1.5},
            {**row(7), "answers": [{"answer_id": 1, "text": "a"}]},
            {**row(8), "answers": [3]},
            {**row(9), "qid": True},
            "[" * 5000,
            "",
            row(12, 1, license="CC0"),
        ],
    )
    found = list(read_jsonl(path, "mine"))
    told = dict(faults(found))
    assert [*told] == [f"line {number}" for number in range(2, 12)]
    assert str(told["line 2"]).startswith("malformed JSON")
    assert str(told["line 4"]).startswith("malformed JSON")
    assert told["line 5"] == "question is no text"
    assert told["line 6"] == "answers is no list"
    assert told["line 7"] == "qid is no whole number: 1.5"
    assert told["line 8"] == "votes is missing"
    assert [record.credit.license for each in found for record in each.records] == [
        "mine", "mine", "mine", "CC0", "CC0",
    ]  # fmt: skip


def test_a_huge_line_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lines, rows):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 200)
    path = jsonl(tmp_path / "a.jsonl", [row(1), row(2, question="x" * 1000), row(3)])
    found = list(read_jsonl(path, "mine"))
    assert [where for where, _ in faults(found)] == ["line 2"]
    assert len(found) == 3


def test_a_broken_row_of_a_table_is_a_fault(tmp_path: Path) -> None:
    rows = [PUBLISHED, {**PUBLISHED, "qid": None}, {**PUBLISHED, "answers": None}, PUBLISHED]
    found = list(read_parquet(parquet(tmp_path / "a.parquet", rows), "mine"))
    assert faults(found) == [("row 2", "qid is missing"), ("row 3", "answers is no list")]


def test_another_table_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [{"qid": 1, "text": "a"}])
    with pytest.raises(BadSource, match="lacks the columns answers, question; it has qid, text"):
        list(read_parquet(path, "mine"))


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [PUBLISHED])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BadSource, match=r"a\.parquet cannot be read as Parquet"):
        list(read_parquet(path, "mine"))
    with pytest.raises(BadSource, match=r"a\.parquet cannot be read as Parquet"):
        rows.num_rows_of(path)


def test_reading_goes_on_from_any_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BATCH_ROWS", 3)
    table = [{**PUBLISHED, "qid": number} for number in range(1, 14)]
    path = parquet(tmp_path / "a.parquet", table, row_group_size=5)
    whole = list(read_parquet(path, "mine"))
    assert len(whole) == 13
    for each in whole:
        assert list(read_parquet(path, "mine", each.end, each.number)) == whole[each.number :]
    path = jsonl(tmp_path / "a.jsonl", [*map(json.dumps, table[:4]), "", "{"])
    whole = list(read_jsonl(path, "mine"))
    for done, each in enumerate(whole, 1):
        assert list(read_jsonl(path, "mine", each.end, each.number)) == whole[done:]
