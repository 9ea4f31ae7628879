"""Pairs: better over worse, never of equals, at most so many; and which answer is the best."""

from __future__ import annotations

from chatserve.train.data.pairs import ScoredAnswer, best_answer, pairs_of


def answers(*scores: int) -> list[ScoredAnswer]:
    return [ScoredAnswer(str(k), f"text {k}", score) for k, score in enumerate(scores)]


def test_every_pair_of_unequal_scores() -> None:
    found = pairs_of(answers(3, 1, 1, -1), 10, "q")
    ids = {(pair.chosen.answer_id, pair.rejected.answer_id) for pair in found}
    assert ids == {("0", "1"), ("0", "2"), ("0", "3"), ("1", "3"), ("2", "3")}
    assert all(pair.chosen.score > pair.rejected.score for pair in found)


def test_ties_and_single_answers_make_no_pair() -> None:
    assert pairs_of(answers(2, 2, 2), 10, "q") == []
    assert pairs_of(answers(5), 10, "q") == []
    assert pairs_of([], 10, "q") == []


def test_equal_texts_make_no_pair() -> None:
    same = [ScoredAnswer("1", "yes", 4), ScoredAnswer("2", "yes", 0)]
    assert pairs_of(same, 10, "q") == []


def test_at_most_ten_and_always_the_same() -> None:
    many = answers(*range(20))
    found = pairs_of(many, 10, "q")
    assert len(found) == len(set(found)) == 10
    assert pairs_of([*reversed(many)], 10, "q") == found
    assert pairs_of(many, 10, "another") != found


def test_the_best_is_the_older_of_equals_and_not_voted_down() -> None:
    best = best_answer(answers(1, 3, 3))
    assert best is not None and best.answer_id == "1"
    assert best_answer(answers(-1, -1)) is None
    assert best_answer([]) is None
