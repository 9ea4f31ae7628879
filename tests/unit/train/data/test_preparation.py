"""Preparing: what is in the tables, who is credited, what is refused, and going on."""

from __future__ import annotations

import errno
import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from chatserve.errors import CannotWrite, UsageError
from chatserve.train.data import buckets, preparation
from chatserve.train.data.preparation import PreparationFailed, Settings, prepare
from chatserve.train.data.records import BadSource
from chatserve.train.data.source import SAMPLE, open_source
from chatserve.train.data.splits import SPLITS
from chatserve.train.data.work_folder import WorkFolder
from tests.posts import dump, jsonl, many_posts, row

SETTINGS = Settings(pairs=10, shares=(40, 30, 20, 10), seed=0, text="html")
REWARD = Settings(pairs=10, shares=(1, 1_000_000, 1, 1), seed=0, text="html")
FINETUNE = Settings(pairs=10, shares=(1_000_000, 1, 1, 1), seed=0, text="html")


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 2000)
    monkeypatch.setattr(buckets, "MAX_BUFFER_BYTES", 1500)


def made(
    path: Path,
    out: Path,
    settings: Settings = SETTINGS,
    *,
    skip_bad: bool = False,
    told: list[str] | None = None,
) -> dict[str, Any]:
    tell: Callable[[str], None] = [].append if told is None else told.append
    return prepare(
        open_source(path, "https://ai.example.com", "CC BY-SA 4.0"), out, settings,
        skip_bad=skip_bad, num_workers=1, bar=lambda _: nullcontext(lambda *_: None), tell=tell,
    )  # fmt: skip


def table(out: Path, split: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pyarrow.parquet.read_table(out / split).to_pylist()
    return found


def files(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*")) if path.is_file()
    }  # fmt: skip


def credits(out: Path) -> list[dict[str, Any]]:
    lines = (out / "attribution.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_tables_of_a_dump(tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = made(dump(tmp_path / "Posts.xml", many_posts(200)), out)
    assert sorted(path.name for path in out.iterdir()) == [
        "attribution.jsonl", "evaluation", "finetune", "manifest.json", "reward", "rl",
    ]  # fmt: skip
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert {split: len(table(out, split)) for split in SPLITS} == manifest["rows"]
    assert all(manifest["rows"].values())
    assert len([*(out / "finetune").iterdir()]) > 5
    for split in ("reward", "evaluation"):
        for each in table(out, split):
            assert each["score_chosen"] > each["score_rejected"]
            assert each["chosen"] != each["rejected"]
    assert set(table(out, "finetune")[0]) == {"question_id", "question", "answer"}
    assert set(table(out, "rl")[0]) == {"question_id", "question"}


def test_a_question_is_in_one_split_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(dump(tmp_path / "Posts.xml", many_posts(200)), out)
    ids = [{each["question_id"] for each in table(out, split)} for split in SPLITS]
    assert all(not a & b for a, b in itertools.combinations(ids, 2))


def test_the_order_and_the_form_of_the_source_do_not_matter(tmp_path: Path) -> None:
    posts = many_posts(100)
    first, second = tmp_path / "1" / "Posts.xml", tmp_path / "2" / "Posts.xml"
    for path, rows in ((first, posts), (second, [*reversed(posts)])):
        path.parent.mkdir()
        made(dump(path, rows), path.parent / "out")
    assert files(first.parent / "out") == files(second.parent / "out")
    table_rows = [row(n, 3, 1, -2) for n in range(1, 60)]
    made(jsonl(tmp_path / "a.jsonl", table_rows), tmp_path / "a")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table_rows), tmp_path / "b.parquet")
    made(tmp_path / "b.parquet", tmp_path / "b")
    ours, theirs = files(tmp_path / "a"), files(tmp_path / "b")
    digests = [json.loads(each.pop("manifest.json"))["source"]["digest"] for each in (ours, theirs)]
    assert digests[0] == digests[1]
    for split in SPLITS:
        assert table(tmp_path / "a", split) == table(tmp_path / "b", split)


def test_ties_single_answers_and_empty_posts_are_counted(tmp_path: Path) -> None:
    empty = {"answer_id": 99, "text": "<p> </p>", "votes": 9}
    rows = [
        row(1, 2, 2),
        row(2, 5),
        row(3),
        row(4, 1, 0, question="<p></p>"),
        {**row(5, 3), "answers": [*row(5, 3)["answers"], empty]},
        row(6, 4, 1),
        row(7, 1, 0, question="<div>" * 5000 + "x"),
    ]
    manifest = made(jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", REWARD)
    counts = manifest["counts"]
    assert counts["questions to compare with only tied answers"] == 1
    assert counts["questions to compare with fewer than two answers"] == 3
    assert counts["empty posts"] == 2
    assert counts["unreadable posts"] == 1
    (only,) = table(tmp_path / "out", "reward")
    assert (only["question_id"], only["score_chosen"], only["score_rejected"]) == ("6", 2, 1)
    assert [each["question_id"] for each in credits(tmp_path / "out")] == ["6"]


def test_the_best_answer_is_learned_unless_it_was_voted_down(tmp_path: Path) -> None:
    accepted = {"answer_id": 77, "text": "<p>ok</p>", "votes": 3, "selected": True}
    rows = [
        {**row(1, 3), "answers": [*row(1, 3)["answers"], accepted]},
        row(2, -1, -4),
        row(3, 0),
    ]
    manifest = made(jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", FINETUNE)
    answers = {each["question_id"]: each["answer"] for each in table(tmp_path / "out", "finetune")}
    assert answers == {"1": "ok", "3": "answer 3-0"}
    assert manifest["counts"]["questions without a good answer"] == 1


def test_markdown_is_left_alone(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row(1, 3, question="if a < b: *x*  \r\n")])
    settings = Settings(pairs=10, shares=(1_000_000, 1, 1, 1), seed=0, text="markdown")
    made(path, tmp_path / "out", settings)
    assert table(tmp_path / "out", "finetune")[0]["question"] == "if a < b: *x*"


def test_whoever_wrote_what_is_used_is_named(tmp_path: Path) -> None:
    path = dump(tmp_path / "Posts.xml", many_posts(60))
    made(path, tmp_path / "out", FINETUNE)
    by_question = {each["question_id"]: each for each in credits(tmp_path / "out")}
    rows = table(tmp_path / "out", "finetune")
    assert set(by_question) == {each["question_id"] for each in rows}
    for each in rows:
        credit = by_question[each["question_id"]]
        (answer,) = credit["answers"]
        assert credit["url"] == f"https://{each['question_id'].replace('/', '/questions/')}"
        assert each["answer"] == f"text {answer['answer_id']}"
        assert answer["url"] == f"https://ai.example.com/a/{answer['answer_id']}"
        assert answer["license"] == "CC BY-SA 4.0"
        assert answer["author_url"].startswith("https://ai.example.com/users/")


def test_a_post_that_comes_twice_is_one_and_answers_to_nothing_are_counted(tmp_path: Path) -> None:
    posts = many_posts(40)
    lost = [each for each in posts if 'ParentId="7"' in each]
    rest = [each for each in posts if ' Id="7"' not in each]
    manifest = made(dump(tmp_path / "Posts.xml", [*rest, *rest[:10]]), tmp_path / "out")
    assert manifest["counts"]["repeated"] == 10
    assert manifest["counts"]["answers without their question"] == len(lost) == 2


def bad_source(folder: Path) -> Path:
    rows: Sequence[object] = [row(1, 3, 1), "{", row(2, 1, 0), {"qid": 3}, row(4, 2)]
    return jsonl(folder / "a.jsonl", rows)


def test_bad_rows_stop_it_and_are_left_out_when_asked(tmp_path: Path) -> None:
    path, out = bad_source(tmp_path), tmp_path / "out"
    with pytest.raises(BadSource) as caught:
        made(path, out)
    assert caught.value.message.startswith(
        "2 rows of a.jsonl cannot be read: a.jsonl, line 2: malformed JSON"
    )
    assert "--skip-bad" in caught.value.message
    assert not (out / "manifest.json").exists()
    manifest = made(path, out, skip_bad=True)
    assert manifest["counts"]["bad rows"] == 2
    assert manifest["bad rows"][1] == "a.jsonl, line 4: answers is no list"
    assert manifest["counts"]["questions"] == 3


def test_a_corrected_source_is_read_anew(tmp_path: Path) -> None:
    path, out = bad_source(tmp_path), tmp_path / "out"
    with pytest.raises(BadSource):
        made(path, out)
    jsonl(path, [row(1, 3, 1), row(2, 1, 0), row(4, 2)])
    told: list[str] = []
    manifest = made(path, out, told=told)
    assert told == ["the source has changed since this was begun: reading it from its beginning"]
    assert manifest["counts"]["questions"] == 3 and manifest["counts"]["bad rows"] == 0


def test_a_source_of_bad_rows_alone_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "MAX_BAD", 5)
    path = jsonl(tmp_path / "a.jsonl", ["{"] * 9)
    with pytest.raises(BadSource, match=r"the first 5 rows of a\.jsonl cannot be read"):
        made(path, tmp_path / "out")
    with pytest.raises(BadSource, match="holds no question and no answer"):
        made(path, tmp_path / "out", skip_bad=True)


def test_what_is_whole_is_not_made_again(tmp_path: Path) -> None:
    path, out = jsonl(tmp_path / "a.jsonl", [row(1, 3, 1), row(2, 3)]), tmp_path / "out"
    made(path, out)
    before, told = files(out), []
    made(path, out, told=told)
    assert files(out) == before and told == [f"{out} holds these data already"]
    with pytest.raises(UsageError, match="holds other data: seed was 0 and is 3; name another"):
        made(path, out, Settings(pairs=10, shares=(40, 30, 20, 10), seed=3, text="html"))
    jsonl(path, [row(1, 3, 2), row(2, 3)])
    with pytest.raises(UsageError, match="the source has changed since"):
        made(path, out)
    jsonl(path, [row(1, 3, 1)])
    with pytest.raises(UsageError, match="the source has other files"):
        made(path, out)
    assert files(out) == before


def test_going_on_with_other_settings_is_refused(tmp_path: Path) -> None:
    path, out = bad_source(tmp_path), tmp_path / "out"
    with pytest.raises(BadSource):
        made(path, out)
    with pytest.raises(UsageError) as caught:
        made(path, out, REWARD)
    assert "begun with other settings: shares was [40, 30, 20, 10] and is [1, " in str(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", "thesis.txt"])
def test_another_folder_is_left_alone(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(UsageError, match="name another folder with --out"):
        made(SAMPLE, out)
    assert files(out) == {name: b"mine"}


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        WorkFolder(out).alone(),
        pytest.raises(UsageError, match="another process prepares data in"),
    ):
        made(SAMPLE, out)


@pytest.mark.parametrize("at", range(0, 60, 7))
def test_a_full_disk_is_told_and_what_is_done_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    path = dump(tmp_path / "Posts.xml", many_posts(60))
    made(path, tmp_path / "whole")
    out, count, opened = tmp_path / "out", itertools.count(), Path.open

    def fails(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        is_written = mode[0] in "wa" and self.is_relative_to(out) and self.name != "lock"
        if is_written and next(count) >= at:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return opened(self, mode, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fails)
        with pytest.raises(CannotWrite) as caught:
            made(path, out)
    assert "(No space left on device), where" in caught.value.message
    assert "MB are free; what is done is kept: make room and run the same" in caught.value.message
    assert not [*out.rglob("*.part")]
    made(path, out)
    assert files(out) == files(tmp_path / "whole")


def test_damage_to_what_was_read_is_told(tmp_path: Path) -> None:
    path, out = bad_source(tmp_path), tmp_path / "out"
    with pytest.raises(BadSource):
        made(path, out)
    for bucket in (out / ".work/buckets").iterdir():
        bucket.write_bytes(bucket.read_bytes()[:4] + bytes(bucket.stat().st_size - 4))
    with pytest.raises(PreparationFailed, match="is damaged; remove that folder"):
        made(path, out, skip_bad=True)


def test_buckets_that_are_shorter_than_they_were_are_read_anew(tmp_path: Path) -> None:
    path, out = bad_source(tmp_path), tmp_path / "out"
    with pytest.raises(BadSource):
        made(path, out)
    for bucket in (out / ".work/buckets").iterdir():
        bucket.write_bytes(b"")
    told: list[str] = []
    assert made(path, out, skip_bad=True, told=told)["counts"]["questions"] == 3
    assert told == ["what was kept is not whole: reading the source from its beginning"]


def test_the_sample_fills_every_split(tmp_path: Path) -> None:
    manifest = made(SAMPLE, tmp_path / "out")
    assert all(manifest["rows"].values())
    assert [*manifest["licenses"]] == ["Apache-2.0"]
    assert (SAMPLE.parent / "NOTICE").is_file()
