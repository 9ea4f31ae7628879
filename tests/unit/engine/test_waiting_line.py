"""Whose turn it is, without an engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatserve.engine.waiting_line import MAX_PASSED, Priority, WaitingLine


@dataclass(frozen=True)
class Item:
    seq_id: str
    share: bytes = b""
    priority: Priority = "interactive"


def filled(*items: Item) -> WaitingLine[Item]:
    line: WaitingLine[Item] = WaitingLine()
    for item in items:
        line.add(item)
    return line


def many(share: str, count: int, priority: Priority = "interactive") -> list[Item]:
    return [Item(f"{share}{index}", share.encode(), priority) for index in range(count)]


def drained(line: WaitingLine[Item]) -> list[str]:
    names = []
    while line:
        first = line.first()
        assert line.take() is first
        names.append(first.seq_id)
    assert len(line) == 0 and not line.places()
    return names


def test_one_key_is_served_in_the_order_of_arrival() -> None:
    assert drained(filled(*many("a", 4))) == ["a0", "a1", "a2", "a3"]


def test_keys_take_turns_however_many_one_of_them_has_sent() -> None:
    line = filled(*many("a", 200), *many("b", 3), *many("c", 1))
    assert drained(line)[:8] == ["a0", "b0", "c0", "a1", "b1", "a2", "b2", "a3"]


def test_who_comes_later_does_not_wait_for_all_of_another_key() -> None:
    line = filled(*many("a", 50))
    assert [line.take().seq_id for _ in range(3)] == ["a0", "a1", "a2"]
    for item in many("b", 2):
        line.add(item)
    assert drained(line)[:5] == ["a3", "b0", "a4", "b1", "a5"]


def test_batch_waits_for_interactive_ones_of_any_key() -> None:
    line = filled(*many("x", 2, "batch"), *many("a", 2), *many("b", 2))
    assert drained(line) == ["a0", "b0", "a1", "b1", "x0", "x1"]


def test_batch_is_passed_a_few_times_only() -> None:
    line = filled(*many("x", 3, "batch"), *many("a", 100))
    order = drained(line)
    places = [order.index(f"x{index}") for index in range(3)]
    assert places == [MAX_PASSED, 2 * MAX_PASSED + 1, 3 * MAX_PASSED + 2]


def test_interactive_ones_that_come_all_the_time_do_not_starve_batch() -> None:
    line = filled(Item("x", priority="batch"))
    for number in range(MAX_PASSED):
        line.add(Item(f"a{number}"))
        assert line.take().seq_id == f"a{number}"
    line.add(Item("late"))
    assert line.take().seq_id == "x"
    assert line.take().seq_id == "late"


def test_passing_is_counted_only_while_batch_waits() -> None:
    line = filled(*many("a", 2 * MAX_PASSED))
    for _ in range(MAX_PASSED):
        line.take()
    line.add(Item("x", priority="batch"))
    assert line.take().seq_id == f"a{MAX_PASSED}"


def test_what_is_given_back_goes_before_all_others_the_last_one_first() -> None:
    line = filled(*many("a", 3))
    old, young = line.take(), line.take()
    line.give_back(young)
    line.give_back(old)
    line.add(Item("b", b"b"))
    assert line.places() == {"a2": 3, "b": 4}
    assert drained(line) == ["a0", "a1", "a2", "b"]


@pytest.mark.parametrize(
    ("gone", "order"),
    [("a0", "a1 b0 b1"), ("a1", "a0 b0 b1"), ("b0", "a0 b1 a1"), ("b1", "a0 b0 a1")],
)
def test_who_leaves_takes_no_turn_of_the_key_away(gone: str, order: str) -> None:
    items = [*many("a", 2), *many("b", 2)]
    line = filled(*items)
    item = next(item for item in items if item.seq_id == gone)
    line.remove(item)
    line.remove(item)
    assert drained(line) == order.split()


def test_removing_one_that_was_given_back() -> None:
    line = filled(*many("a", 2))
    first = line.take()
    line.give_back(first)
    line.remove(first)
    assert drained(line) == ["a1"]


SHARES = st.sampled_from([b"", b"a", b"b"])
PRIORITIES: st.SearchStrategy[Priority] = st.sampled_from(["interactive", "batch"])


@given(
    st.lists(st.tuples(SHARES, PRIORITIES), max_size=40),
    st.integers(0, 20),
    st.sets(st.integers(0, 39)),
)
def test_places_are_the_order_in_which_all_are_taken(
    kinds: list[tuple[bytes, Priority]], num_taken: int, gone: set[int]
) -> None:
    items = [Item(str(i), share, priority) for i, (share, priority) in enumerate(kinds)]
    line = filled(*items)
    taken = [line.take() for _ in range(min(num_taken, len(line)))]
    for index in gone & set(range(len(items))):
        line.remove(items[index])
    places = line.places()
    assert sorted(places.values()) == list(range(1, len(line) + 1))
    order = drained(line)
    assert [places[name] for name in order] == list(range(1, len(order) + 1))
    everyone = Counter(item.seq_id for item in items)
    gone_now = Counter(str(index) for index in gone if index < len(items))
    left = everyone - Counter(item.seq_id for item in taken) - gone_now
    assert Counter(order) == left
