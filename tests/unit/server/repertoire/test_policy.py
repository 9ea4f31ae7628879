"""Who makes room, and whose time is over."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatserve.server.repertoire.policy import Holding, Shortage, expired, make_room


def held(name: str, num_bytes: int, used_at: float, *, is_busy: bool = False) -> Holding:
    return Holding(name, num_bytes, used_at, is_busy)


@pytest.mark.parametrize(
    ("need", "free", "holdings", "going"),
    [
        (5, 5, [held("a", 3, 1)], []),
        (5, 2, [held("new", 3, 2), held("old", 3, 1)], ["old"]),
        (5, 0, [held("new", 3, 2), held("old", 3, 1)], ["old", "new"]),
        # a small one that is older does not go for nothing
        (8, 0, [held("small", 1, 1), held("large", 10, 2)], ["large"]),
        (8, 0, [held("a", 2, 1), held("b", 5, 2), held("c", 6, 3)], ["a", "c"]),
        (5, 2, [held("busy", 9, 1, is_busy=True), held("idle", 3, 2)], ["idle"]),
        (5, -4, [held("a", 9, 1)], ["a"]),
    ],
)
def test_the_ones_not_used_for_longest_go(
    need: int, free: int, holdings: list[Holding], going: list[str]
) -> None:
    assert make_room(need, free, holdings) == going


def test_who_is_busy_stays_and_is_named() -> None:
    lack = make_room(9, 1, [held("a", 5, 1, is_busy=True), held("b", 3, 2)])
    assert lack == Shortage(1, 3, 5, ("a",), is_for_good=False)


def test_what_never_fits_is_known() -> None:
    lack = make_room(10, 1, [held("a", 5, 1, is_busy=True), held("b", 3, 2)])
    assert isinstance(lack, Shortage) and lack.is_for_good


holdings_of_all_kinds = st.lists(
    st.builds(
        Holding,
        name=st.uuids().map(str),
        num_bytes=st.integers(0, 20),
        used_at=st.floats(0, 100),
        is_busy=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda each: each.name,  # two draws may be the same
)


@given(st.integers(0, 100), st.integers(-20, 50), holdings_of_all_kinds)
def test_there_is_room_then_nobody_goes_in_vain_and_no_busy_one(
    need: int, free: int, holdings: list[Holding]
) -> None:
    found = make_room(need, free, holdings)
    by_name = {each.name: each for each in holdings}
    if isinstance(found, Shortage):
        idle_bytes = sum(each.num_bytes for each in holdings if not each.is_busy)
        assert need > free + idle_bytes
        assert found.is_for_good == (need > free + sum(each.num_bytes for each in holdings))
        return
    gone = [by_name[name] for name in found]
    assert not any(each.is_busy for each in gone)
    left = free + sum(each.num_bytes for each in gone) - need
    assert left >= 0
    assert all(each.num_bytes > left for each in gone)


def test_time_is_over_for_who_was_idle_so_long() -> None:
    holdings = [held("old", 1, 10), held("new", 1, 95), held("busy", 1, 0, is_busy=True)]
    assert expired(holdings, 100, 90) == ["old"]
    assert expired(holdings, 99.9, 90) == []
    assert expired(holdings, 100, 0) == ["old", "new"]
