"""Who is taken on and who is told to come back, without an engine."""

from __future__ import annotations

import pytest

from chatserve.engine.admission import MAX_RETRY_S, Admission, Pace, Place
from chatserve.engine.waiting_line import Priority
from chatserve.errors import Overloaded


def fill(admission: Admission, share: bytes, count: int) -> list[Place]:
    return [admission.enter(share) for _ in range(count)]


def num_taken(admission: Admission, share: bytes, priority: Priority = "interactive") -> int:
    """How many of 1000 are taken on."""
    for count in range(1000):
        try:
            admission.check(share, priority)
        except Overloaded:
            return count
        admission.add(share)
    raise AssertionError("there is no limit")


def test_as_many_as_may_run_and_wait_are_taken_on() -> None:
    admission = Admission(4, 8)
    assert num_taken(admission, b"") == 12
    with pytest.raises(
        Overloaded, match="8 requests are waiting already, the limit is 8"
    ) as caught:
        admission.enter(b"")
    assert caught.value.retry_after_s >= 1


def test_a_key_that_is_alone_has_the_whole_queue() -> None:
    assert num_taken(Admission(4, 8), b"a") == 12


def test_a_flood_of_one_key_does_not_keep_another_out() -> None:
    admission = Admission(4, 8)
    assert num_taken(admission, b"a") == 12
    # its fair share of 12 is 6, of which so many fit beyond the limit
    assert num_taken(admission, b"b") == 4
    assert num_taken(admission, b"a") == num_taken(admission, b"c") == 0


def test_who_has_more_than_a_fair_share_waits_until_there_is_room() -> None:
    admission = Admission(1, 9)
    assert num_taken(admission, b"a") == 10
    assert num_taken(admission, b"b") == 5
    for _ in range(6):
        admission.remove(b"a")
    # nine places are taken of ten
    assert num_taken(admission, b"b") == 1


def test_places_come_back_and_are_given_back_once() -> None:
    admission = Admission(1, 1)
    first, second = fill(admission, b"", 2)
    first.release()
    first.release()
    with admission.enter(b""), pytest.raises(Overloaded):
        admission.enter(b"")
    second.release()
    assert num_taken(admission, b"") == 2


def test_a_limit_for_one_key_holds_for_each_and_not_for_those_without() -> None:
    admission = Admission(4, 8, 3)
    assert num_taken(admission, b"a") == num_taken(admission, b"b") == 3
    assert num_taken(admission, b"") == 6
    with pytest.raises(Overloaded, match="the limit for one key is 3"):
        admission.enter(b"a")


def test_batch_leaves_a_quarter_of_the_queue_to_others() -> None:
    admission = Admission(4, 8)
    assert num_taken(admission, b"a", "batch") == 10
    with pytest.raises(Overloaded, match="the rest of the queue is for interactive ones"):
        admission.check(b"b", "batch")
    assert num_taken(admission, b"a") == 2


def test_when_to_come_back_follows_the_measured_speed() -> None:
    admission = Admission(1, 10)
    for _ in range(200):
        admission.pace.note_step(2, 0.1)  # 20 tokens a second
        admission.pace.note_answer(40)
    assert num_taken(admission, b"") == 11
    with pytest.raises(Overloaded, match=r"try again in 2[01] s") as caught:
        admission.enter(b"")
    # ten wait, each for 40 tokens
    assert caught.value.retry_after_s in (20, 21)
    for _ in range(200):
        admission.pace.note_step(20, 0.1)
    with pytest.raises(Overloaded) as caught:
        admission.enter(b"")
    assert caught.value.retry_after_s in (2, 3)


@pytest.mark.parametrize(("tokens_per_step", "retry_after_s"), [(0, MAX_RETRY_S), (1e6, 1)])
def test_nobody_is_told_to_come_back_at_once_or_never(
    tokens_per_step: int, retry_after_s: int
) -> None:
    admission = Admission(1, 10)
    admission.pace.note_step(1, 1.0)
    for _ in range(500):
        admission.pace.note_step(tokens_per_step, 1.0)
    num_taken(admission, b"")
    with pytest.raises(Overloaded) as caught:
        admission.enter(b"")
    assert caught.value.retry_after_s == retry_after_s


def test_before_the_first_step_nothing_is_known() -> None:
    pace = Pace()
    assert (pace.tokens_per_s, pace.wait_s(5)) == (0, 0)
