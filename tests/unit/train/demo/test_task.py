"""The demo's checkable reward, and that its data are the recipe's."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from chatserve.train.data.preparation import Settings, prepare
from chatserve.train.data.source import open_source
from chatserve.train.demo import task
from chatserve.train.prepared_rows import read_rows


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("apple, pear, plum, fig", 1.0),
        (" Apple, pear, plum, fig.\n", 1.0),
        ("apple, pear, plum", 0.75),
        ("apple, pear, plum, plum", 0.5),
        ("apple, pear, plum, hammer", 0.5),
        ("apple, pear, plum, fig, kiwi", 0.75),
        ("apple, hammer, saw, drill", 0.0),
        ("", 0.0),
    ],
)
def test_what_an_answer_is_worth(answer: str, expected: float) -> None:
    assert task.reward("Name four fruits.", answer) == expected


def test_every_question_says_what_it_wants() -> None:
    asked = task.questions()
    assert len(set(asked)) == len(asked) == 256
    assert task.wish(asked[0]) == (2, "fruits")
    assert {task.wish(question)[1] for question in asked} == set(task.WORDS)


def test_another_question_is_refused() -> None:
    with pytest.raises(ValueError, match="Why is the sky blue"):
        task.wish("Why is the sky blue?")


def test_the_same_seed_makes_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        task.write_source(tmp_path / name, seed=seed)
    one, again, other = ((tmp_path / name).read_bytes() for name in ("one", "again", "other"))
    assert one == again != other


def test_the_tables_prefer_what_the_reward_prefers(tmp_path: Path) -> None:
    task.write_source(tmp_path / "demo.jsonl")
    source = open_source(tmp_path / "demo.jsonl", None, "CC0")
    prepare(
        source, tmp_path / "data", Settings(10, (40, 30, 20, 10), 0, "markdown"),
        skip_bad=False, num_workers=1, bar=lambda _: nullcontext(lambda *_: None), tell=print,
    )  # fmt: skip
    pairs = list(read_rows(tmp_path / "data", "reward", ("question", "chosen", "rejected")))
    assert len(pairs) > 300
    for question, chosen, rejected in pairs:
        assert task.reward(question, chosen) > task.reward(question, rejected)
    taught = [task.reward(*row) for row in read_rows(
        tmp_path / "data", "finetune", ("question", "answer"))]  # fmt: skip
    assert 0.5 < sum(taught) / len(taught) < 0.98  # something is left to learn
