"""Sources: which files of a folder, in which form; what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatserve.train.data.records import BadSource
from chatserve.train.data.source import Place, open_source
from tests.posts import dump, jsonl, post, row


def test_the_site_is_guessed_from_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "ai.stackexchange.com"
    folder.mkdir()
    dump(folder / "Posts.xml", [post(1)])
    (folder / "Users.xml").write_text("<users></users>")
    source = open_source(folder, None, "mine")
    assert source.site == "https://ai.stackexchange.com"
    assert [file.path.name for file in source.files] == ["Posts.xml"]
    assert open_source(folder, "https://b.example/", "mine").site == "https://b.example"
    dump(tmp_path / "Posts.xml", [post(1)])
    assert open_source(tmp_path / "Posts.xml", None, "mine").site is None


def test_the_files_of_a_folder_follow_one_another(tmp_path: Path) -> None:
    for name in ("b", "a"):
        jsonl(tmp_path / f"{name}.jsonl", [row(ord(name), 1), row(ord(name) + 100, 1)])
    source = open_source(tmp_path, None, "mine")
    found = [*source.rows(Place())]
    ids = [row.records[0].question_id for _, _, row in found]
    assert ids == ["97", "197", "98", "198"]
    for done, (place, _, _) in enumerate(found, 1):
        assert [*source.rows(place)] == found[done:]
    assert found[-1][1] == source.num_bytes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Posts.7z", "is packed; unpack it first"),
        ("gone.xml", "there is no such file or folder"),
        ("notes.txt", r"is none of Posts\.xml, \*\.jsonl and \*\.parquet"),
        ("empty", r"has no file of Posts\.xml"),
        ("mixed", r"has both \*\.jsonl and \*\.parquet"),
    ],
)
def test_what_is_no_source_is_told(tmp_path: Path, name: str, message: str) -> None:
    for file in ("Posts.7z", "notes.txt", "mixed/a.jsonl", "mixed/b.parquet", "empty/a.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(BadSource, match=message):
        open_source(tmp_path / name, None, "mine")
