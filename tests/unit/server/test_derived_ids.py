"""Ids inside an answer: the same wherever it goes on, and no two alike."""

from __future__ import annotations

from itertools import islice

from chatserve.server.derived_ids import call_ids, item_id


def ids(answer_id: str, choice: int, *, is_short: bool = False) -> list[str]:
    return list(islice(call_ids(answer_id, choice, is_short=is_short), 100))


def test_ids_of_calls() -> None:
    assert ids("chatcmpl-1", 0) == ids("chatcmpl-1", 0)
    different = {*ids("chatcmpl-1", 0), *ids("chatcmpl-1", 1), *ids("chatcmpl-2", 0)}
    assert len(different) == 300
    assert all(each.startswith("call_") and len(each) == 29 for each in different)
    assert all(each[5:].isalnum() and each.isascii() for each in different)


def test_short_ids() -> None:
    """A template of Mistral takes no others."""
    short = ids("chatcmpl-1", 0, is_short=True)
    assert len(set(short)) == 100
    assert all(len(each) == 9 and each.isalnum() and each.isascii() for each in short)


def test_ids_of_items() -> None:
    places = {item_id("msg", answer, place) for answer in ("a", "b") for place in range(50)}
    assert len(places) == 100
    assert all(each.startswith("msg_") and len(each) == 36 for each in places)
    assert item_id("msg", "a", 1)[4:] != item_id("fc", "a", 1)[3:]
    assert item_id("fc", "a", 1) == item_id("fc", "a", 1)
