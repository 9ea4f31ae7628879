"""Drafts from a sequence's own past: the same text, only sooner, and no trace of wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chatserve.engine.engine import Engine
from chatserve.engine.sequence import SamplingParams, TokenEvent
from chatserve.engine.speculation import Drafter
from chatserve.errors import GenerationFailed
from chatserve.models.batch import Batch
from tests import tiny
from tests.unit.engine.ledger import LedgerModel, LedgerPool
from tests.unit.engine.scripted import GREEDY, PROMPT_LEN, ByteTokenizer, Scripted, drain, text

BLOCK_SIZE = 4


def test_a_draft_is_what_followed_the_last_three_tokens_the_last_time() -> None:
    ids = [1, 2, 3, 7, 7, 0, 1, 2, 3, 8, 9, 0, 1, 2, 3]
    assert Drafter(ids).draft(5) == [8, 9]


def test_two_alike_tokens_are_taken_when_no_three_are() -> None:
    assert Drafter([5, 2, 3, 8, 9, 0, 2, 3]).draft(5) == [8, 9]
    assert Drafter([5, 2, 3, 8, 9, 0, 4, 3]).draft(5) == []
    assert Drafter([1]).draft(5) == Drafter([1, 1]).draft(5) == []


def test_a_short_period_goes_on_beyond_the_end() -> None:
    drafter = Drafter([1, 2, 1, 2, 1])
    drafter.learn(2, 2)
    drafter.learn(2, 2)
    assert drafter.draft(9) == [2, 1, 2, 1, 2]
    assert drafter.draft(3) == [2, 1, 2]


def test_no_draft_is_longer_than_asked() -> None:
    assert Drafter([1, 2, 1, 2, 1]).draft(0) == []


def test_drafts_grow_while_they_are_right_and_shrink_to_what_was() -> None:
    drafter = Drafter([1] * 9)
    lengths = []
    for accepted in (2, 4, 5, 3, 3, 5):
        lengths.append(len(drafter.draft(9)))
        drafter.learn(lengths[-1], accepted)
    assert lengths == [2, 4, 5, 5, 3, 5]


def test_where_all_was_wrong_there_is_a_longer_and_longer_pause() -> None:
    ids = [1] * 9
    drafter = Drafter(ids)
    pauses, last = [], len(ids)
    for _ in range(1000):
        if draft := drafter.draft(5):
            pauses.append(len(ids) - last)
            last = len(ids)
            drafter.learn(len(draft), 0)
        ids.append(1)
    assert pauses == [0, 8, 16, 32, 64, 128, 256, 256]
    assert len(drafter.draft(5)) <= 1


class Repeating(Scripted):
    """Says its script over and over, whatever was said before."""

    def __init__(self, script: str) -> None:
        super().__init__(script, eos=False)

    def write_row(self, row: torch.Tensor, history: list[int]) -> None:
        super().write_row(row, history)
        if history[-1] in self.nan_ids:
            row[3] = torch.nan

    nan_ids: frozenset[int] = frozenset()


def build(model: LedgerModel, *, speculation: bool = True, **options: Any) -> Engine:
    return Engine(
        model, ByteTokenizer(), num_kv_tokens=400, block_size=BLOCK_SIZE, speculation=speculation,
        **options,
    )  # fmt: skip


def run(model: LedgerModel, params: SamplingParams, **options: Any) -> list[TokenEvent]:
    engine = build(model, **options)
    engine.add("a", [0, 1, 2, 3], params)
    events = drain(engine)["a"]
    assert engine.num_free_kv_tokens == 400
    return events


def both(script: str, params: SamplingParams) -> tuple[list[TokenEvent], list[TokenEvent]]:
    """Without and with speculation; the text and the end are the same."""
    plain = run(Repeating(script), params, speculation=False)
    drafted = run(Repeating(script), params)
    assert text(drafted) == text(plain)
    for events in (plain, drafted):
        assert [event.is_last for event in events].count(True) == 1
    ends = [(e[-1].finish_reason, e[-1].num_generated_tokens) for e in (plain, drafted)]
    assert ends[0] == ends[1]
    ids = [[id_ for event in events for id_ in event.token_ids] for events in (plain, drafted)]
    assert ids[0] == ids[1]
    assert drafted[-1].num_generated_tokens == len(ids[0])
    return plain, drafted


def test_a_text_that_repeats_itself_comes_several_tokens_at_a_time() -> None:
    plain, drafted = both("abcdefg", SamplingParams(temperature=0, max_tokens=200))
    assert (len(plain), len(drafted)) == (200, 42)
    assert max(len(event.token_ids) for event in drafted) == 6


@pytest.mark.parametrize("max_tokens", range(14, 30))
def test_max_tokens_in_the_middle_of_a_run_ends_exactly_there(max_tokens: int) -> None:
    _, drafted = both("abc", SamplingParams(temperature=0, max_tokens=max_tokens))
    assert drafted[-1].num_generated_tokens == max_tokens


class EndsAt(Repeating):
    """Repeats itself and then says the end at a position that no draft foretells … or does."""

    def __init__(self, script: str, position: int, last_id: int) -> None:
        super().__init__(script)
        self._position, self._last_id = position, last_id

    def write_row(self, row: torch.Tensor, history: list[int]) -> None:
        super().write_row(row, history)
        if len(history) == self._position:
            row[self._last_id] = 99.0


@pytest.mark.parametrize("position", range(20, 28))
@pytest.mark.parametrize("ending", ["eos", "stop id", "stop string"])
def test_an_end_in_the_middle_of_a_run_ends_exactly_there(ending: str, position: int) -> None:
    last_id = tiny.EOS_ID if ending == "eos" else ord("!")
    params = SamplingParams(
        temperature=0, max_tokens=60, stop=("!",) if ending == "stop string" else (),
        stop_token_ids=(ord("!"),) if ending == "stop id" else (),
    )  # fmt: skip
    answers = [
        run(EndsAt("abc", position, last_id), params, speculation=speculation)
        for speculation in (False, True)
    ]
    plain, drafted = answers
    assert text(plain) == text(drafted) == ("abc" * 20)[: position - PROMPT_LEN]
    assert plain[-1].finish_reason == drafted[-1].finish_reason == "stop"
    assert drafted[-1].num_generated_tokens == position - PROMPT_LEN + 1
    assert len(drafted) < len(plain)


@pytest.mark.parametrize("stop", ["cab", "abcabca", "bc"])
def test_a_stop_string_over_the_border_of_a_run_is_not_shown(stop: str) -> None:
    _, drafted = both("abcab" * 3 + "x", SamplingParams(temperature=0, max_tokens=60, stop=(stop,)))
    assert stop not in text(drafted)


def test_what_a_draft_got_wrong_leaves_no_trace() -> None:
    model = LedgerModel(num_ids=2)
    engine = build(model)
    engine.add("a", [0, 1, 0, 1, 0, 1], SamplingParams(temperature=0, max_tokens=80))
    sequence = engine._live["a"].sequence
    num_tokens, num_drafted = 0, 0
    while engine.has_work:
        before = model.num_computed_tokens
        [event] = engine.step()
        num_tokens += len(event.token_ids)
        num_drafted += model.num_computed_tokens - before > len(event.token_ids)
        if not event.is_last:
            assert sequence.num_computed == 6 + num_tokens - 1
            assert len(sequence.table.block_ids) == -(-sequence.num_computed // BLOCK_SIZE)
            assert sequence.table.num_published == sequence.num_computed // BLOCK_SIZE
    assert num_drafted > 3
    # what it has published is what it has said: another finds all of it, and says the same after it
    said = sequence.token_ids
    answers = []
    for other in (engine, build(LedgerModel(num_ids=2), speculation=False)):
        other.add("b", said[:-1], SamplingParams(temperature=0, max_tokens=20))
        answers.append([id_ for event in drain(other)["b"] for id_ in event.token_ids])
    assert answers[0] == answers[1]


def test_an_abort_after_a_draft_frees_everything() -> None:
    engine = build(Repeating("ab"))
    engine.add("a", [0, 1, 2, 3], GREEDY)
    engine.add("b", [0, 1, 2, 4], GREEDY)
    while not any(len(event.token_ids) > 1 for event in engine.step()):
        pass
    engine.abort("a")
    assert text(drain(engine)["b"])[-8:] in "abababababab"
    assert engine.num_free_kv_tokens == 400


def test_a_draft_that_the_model_fails_on_is_tried_without() -> None:
    class FailsOnDrafts(Repeating):
        num_failed = 0

        def forward(self, batch: Batch, pool: LedgerPool) -> torch.Tensor:
            if len(batch.output_rows) > len(batch.segments):
                self.num_failed += 1
                raise RuntimeError("too many rows")
            return super().forward(batch, pool)

    model = FailsOnDrafts("ab")
    assert text(run(model, SamplingParams(temperature=0, max_tokens=30))) == "ab" * 15
    assert model.num_failed > 0


def test_a_sequence_that_broke_off_in_a_draft_fails_alone() -> None:
    model = Repeating("ab")
    engine = build(model)
    engine.add("a", [0, 1, 2, 3], GREEDY)
    while engine.step()[0].num_generated_tokens < 20:
        pass
    model.nan_ids = frozenset({ord("b")})
    [event] = engine.step()
    assert isinstance(event.error, GenerationFailed) and event.num_generated_tokens >= 20
    assert (engine.has_work, engine.num_free_kv_tokens) == (False, 400)


def test_a_fault_in_the_middle_of_a_draft_fails_the_sequence() -> None:
    engine = build(Repeating("ab"))
    engine.add("a", [0, 1, 2, 3], GREEDY)
    while engine.step()[0].num_generated_tokens < 20:
        pass
    output = engine._live["a"].output
    add, calls = output.add, []

    def fails_the_second_time(token_id: int, **options: Any) -> Any:
        calls.append(token_id)
        if len(calls) == 2:
            raise RuntimeError("boom")
        return add(token_id, **options)

    output.add = fails_the_second_time  # type: ignore[method-assign]
    [event] = engine.step()
    assert isinstance(event.error, GenerationFailed) and len(calls) == 2
    assert (engine.has_work, engine.num_free_kv_tokens) == (False, 400)


@pytest.mark.parametrize(("num_seqs", "is_drafted"), [(1, True), (4, True), (5, False)])
def test_only_small_batches_draft(num_seqs: int, is_drafted: bool) -> None:
    model = Repeating("ab")
    engine = build(model, max_num_seqs=8)
    for index in range(num_seqs):
        engine.add(str(index), [index, 1, 2, 3], SamplingParams(temperature=0, max_tokens=40))
    drain(engine)
    assert (model.num_steps < 40) == is_drafted


def test_drafts_stay_within_the_budget() -> None:
    largest = 0

    class Watched(Repeating):
        def forward(self, batch: Batch, pool: LedgerPool) -> torch.Tensor:
            nonlocal largest
            largest = max(largest, len(batch.token_ids))
            return super().forward(batch, pool)

    engine = build(Watched("ab"), max_num_batched_tokens=5)
    for name in "ab":
        engine.add(name, [0, 1, 2, ord(name)], SamplingParams(temperature=0, max_tokens=40))
    drain(engine)
    assert largest == 5


HABITS = {
    "greedy": SamplingParams(temperature=0, max_tokens=60),
    "cool": SamplingParams(temperature=20, max_tokens=60, seed=1),
    "filtered": SamplingParams(temperature=90, max_tokens=60, seed=2, top_k=2),
    "nucleus": SamplingParams(temperature=90, max_tokens=60, seed=3, top_p=0.8),
    "penalised": SamplingParams(
        temperature=50, max_tokens=60, seed=4, frequency_penalty=2, repetition_penalty=1.1
    ),
    "patient": SamplingParams(temperature=40, max_tokens=60, seed=5, min_tokens=30,
                              stop_token_ids=(2,)),
}  # fmt: skip


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("num_ids", [1, 3, 6])
def test_a_sampled_text_is_the_same_with_and_without(habit: str, num_ids: int) -> None:
    answers = []
    for speculation in (False, True):
        engine = build(LedgerModel(num_ids), speculation=speculation)
        for choice in range(3):
            engine.add(str(choice), [0, 1, 0, 1, 0], HABITS[habit], choice=choice)
        answers.append(
            {
                name: ([id_ for event in events for id_ in event.token_ids], text(events),
                       events[-1].finish_reason)
                for name, events in drain(engine).items()
            }
        )  # fmt: skip
    assert answers[0] == answers[1]
