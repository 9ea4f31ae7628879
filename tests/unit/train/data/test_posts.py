"""Posts.xml: questions and answers with who wrote them; broken rows one by one; no traps."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatserve.train.data import lines, posts
from chatserve.train.data.posts import read_posts
from chatserve.train.data.records import MAX_TEXT_LEN, Answer, BadSource, Credit, Question
from chatserve.train.data.rows import Row
from tests.posts import dump, post

SITE = "https://ai.example.com"


def rows(path: Path, offset: int = 0, number: int = 0) -> list[Row]:
    return list(read_posts(path, SITE, "CC BY-SA 4.0", offset, number))


def faults(path: Path) -> list[tuple[str, str]]:
    return [(row.where, row.fault) for row in rows(path) if row.fault is not None]


def test_a_question_and_an_answer(tmp_path: Path) -> None:
    path = dump(
        tmp_path / "Posts.xml",
        [
            post(4, AcceptedAnswerId=7, Body="<p>a\nb</p>", OwnerUserId=3),
            post(7, parent=4, Score=-2, OwnerDisplayName="Ada", ContentLicense="CC BY-SA 2.5"),
            post(9, PostTypeId=5, OwnerUserId=-1),
        ],
    )
    records = [record for row in rows(path) for record in row.records]
    mine = Credit(f"{SITE}/questions/4", "user 3", f"{SITE}/users/3", "CC BY-SA 4.0")
    other = Credit(f"{SITE}/a/7", "Ada", None, "CC BY-SA 2.5")
    assert records == [
        Question("ai.example.com/4", "<p>a\nb</p>", "7", mine),
        Answer("ai.example.com/4", "7", "<p>text 7</p>", -2, None, False, other),
    ]


def test_each_broken_row_is_one_fault_and_the_others_are_read(tmp_path: Path) -> None:
    path = dump(
        tmp_path / "Posts.xml",
        [
            post(1),
            '<row Id="2" PostTypeId="1" Body="<p>" />',
            '<row Id="3" PostTypeId="1" Body="&bomb;" />',
            '<row Id="4" PostTypeId="1" Body="cut off',
            post(5, Id="five"),
            post(6, parent=1, Score=None),
            post(7, parent=1, Score=10**30),
            post(8, PostTypeId=None),
            "<comment />",
            post(10, Body="x" * (MAX_TEXT_LEN + 1)),
            post(11),
        ],
    )
    found = dict(faults(path))
    assert [*found] == [f"line {number}" for number in (4, 5, 6, 7, 8, 9, 10, 11, 12)]
    assert "malformed XML" in found["line 4"]
    assert "undefined entity" in found["line 5"]
    assert found["line 7"] == "Id is no whole number: 'five'"
    assert found["line 8"] == "Score is missing"
    assert found["line 10"] == "PostTypeId is missing"
    assert found["line 12"] == "Body has 200,001 characters, over 200,000"
    read = [record for row in rows(path) for record in row.records]
    assert [record.question_id for record in read] == ["ai.example.com/1", "ai.example.com/11"]


def test_bytes_that_are_no_text_are_a_fault(tmp_path: Path) -> None:
    path = dump(tmp_path / "Posts.xml", [post(1), post(2, Body="caf\u00e9")])
    path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xe9"))
    assert [where for where, _ in faults(path)] == ["line 4"]


def test_a_row_may_span_lines(tmp_path: Path) -> None:
    path = dump(tmp_path / "Posts.xml", ['<row Id="1"', ' PostTypeId="1"', 'Body="a" />', post(2)])
    assert not faults(path)
    assert sum(len(row.records) for row in rows(path)) == 2


def test_a_line_without_end_is_a_fault_and_not_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (lines, posts):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 500)
    path = dump(tmp_path / "Posts.xml", [post(1), post(2, Body="x" * 5000), post(3)])
    assert [where for where, _ in faults(path)] == ["line 4"]
    assert sum(len(row.records) for row in rows(path)) == 2


def test_a_cut_file_is_told(tmp_path: Path) -> None:
    path = dump(tmp_path / "Posts.xml", [post(1), post(2)])
    path.write_bytes(path.read_bytes()[:-9])
    assert [fault for _, fault in faults(path)] == ["the end is missing"]


@pytest.mark.parametrize(
    "head",
    [
        '<!DOCTYPE posts [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;">]>',
        '<!DOCTYPE posts SYSTEM "file:///etc/passwd">',
        '<!DOCTYPE posts [<!ENTITY x SYSTEM "file:///etc/passwd">]> <posts>',
    ],
)
def test_a_document_type_is_refused_and_nothing_read(tmp_path: Path, head: str) -> None:
    path = dump(tmp_path / "Posts.xml", [head, post(1, Body="a")])
    with pytest.raises(BadSource, match="line 3: declares a document type"):
        rows(path)


def test_a_document_type_on_the_first_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "Posts.xml"
    path.write_text('<?xml version="1.0"?><!DOCTYPE posts [<!ENTITY a "b">]><posts>\n</posts>\n')
    with pytest.raises(BadSource, match="line 1: declares"):
        rows(path)


def test_another_encoding_is_refused(tmp_path: Path) -> None:
    path = dump(tmp_path / "Posts.xml", [post(1)])
    text = path.read_text("utf-8-sig")
    path.write_text(text.replace("utf-8", "windows-1252"), "cp1252")
    with pytest.raises(BadSource, match=r"Posts\.xml is in windows-1252; convert it to UTF-8"):
        rows(path)
    path.write_text(text, "utf-16")
    with pytest.raises(BadSource, match="is in UTF-16"):
        rows(path)


def test_reading_goes_on_from_any_row(tmp_path: Path) -> None:
    path = dump(
        tmp_path / "Posts.xml", [post(1), '<row Id="2"', "/>", post(3, parent=1), "<row", post(4)]
    )
    whole = rows(path)
    for done, row in enumerate(whole[:-1], 1):
        assert rows(path, row.end, row.number) == whole[done:]
