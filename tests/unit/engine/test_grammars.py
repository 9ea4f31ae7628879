"""Answers that must match a grammar: masks, ends, drafts, neighbours, faults."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chatserve.engine.engine import Engine
from chatserve.engine.sequence import SamplingParams, TokenEvent
from chatserve.errors import GenerationFailed
from tests import tiny
from tests.unit.engine.ledger import LedgerModel
from tests.unit.engine.scripted import NUM_KV_TOKENS, ByteTokenizer, drain, scripted_engine, text


@dataclass
class Digits:
    """So many digits, then the end; `longest` more may follow before it has to come."""

    shortest: int
    longest: int
    fails_at: int | None = None
    threads: set[str] = field(default_factory=set)

    def matcher(self) -> DigitMatcher:
        return DigitMatcher(self)


@dataclass
class DigitMatcher:
    grammar: Digits
    count: int = 0

    @property
    def is_finished(self) -> bool:
        return self.count >= self.grammar.longest

    def fill_mask(self, words: NDArray[np.uint32]) -> None:
        self.grammar.threads.add(threading.current_thread().name)
        if self.count == self.grammar.fails_at:
            raise GenerationFailed("the grammar is at its wits' end")
        allowed = np.zeros(32 * len(words), np.uint8)
        if not self.is_finished:
            allowed[48:58] = 1
        if self.count >= self.grammar.shortest:
            allowed[tiny.EOS_ID] = 1
        words[:] = np.packbits(allowed, bitorder="little").view(np.uint32)

    def accept(self, token_id: int) -> None:
        if not 48 <= token_id < 58:
            raise GenerationFailed(f"{token_id} is no digit")
        self.count += 1


def engine(**options: Any) -> Engine:
    return Engine(LedgerModel(), ByteTokenizer(), num_kv_tokens=NUM_KV_TOKENS, **options)


def answer(built: Engine, grammar: Digits, **options: Any) -> list[TokenEvent]:
    params = SamplingParams(**{"max_tokens": 64, "seed": 1, "grammar": grammar, **options})
    built.add("a", [1, 2, 3, 4], params)
    return drain(built)["a"]


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}])
def test_an_answer_matches(options: dict[str, Any]) -> None:
    events = answer(engine(), Digits(5, 9), **options)
    assert text(events).isdigit() and 5 <= len(text(events)) <= 9
    assert events[-1].finish_reason == "stop"


def test_an_answer_ends_where_nothing_more_may_follow() -> None:
    events = answer(engine(), Digits(3, 3))
    assert len(text(events)) == 3 and events[-1].num_generated_tokens == 3
    assert events[-1].finish_reason == "stop"


def test_a_budget_that_ends_inside_is_told() -> None:
    events = answer(engine(), Digits(5, 9), max_tokens=4)
    assert len(text(events)) == 4 and events[-1].finish_reason == "length"


def test_the_grammar_says_when_an_answer_may_end() -> None:
    events = answer(engine(), Digits(2, 2), min_tokens=10)
    assert len(text(events)) == 2 and events[-1].finish_reason == "stop"
    events = answer(engine(), Digits(0, 1), temperature=0, logit_bias={tiny.EOS_ID: 1000.0},
                    ignore_eos=True)  # fmt: skip
    assert events[-1].finish_reason == "stop" and text(events) == ""


def test_a_stop_string_still_ends_it() -> None:
    events = answer(engine(), Digits(20, 30), stop=tuple("0123456789"))
    assert text(events) == "" and events[-1].finish_reason == "stop"


def test_masks_are_filled_beside_the_step() -> None:
    grammar = Digits(2, 4)
    answer(engine(), grammar)
    assert all(name.startswith("masks") for name in grammar.threads) and grammar.threads


def test_neighbours_do_not_change_an_answer() -> None:
    alone = text(answer(engine(), Digits(9, 20)))
    busy = engine()
    busy.add("free", [9], SamplingParams(seed=5, max_tokens=40))
    busy.add("other", [8, 8], SamplingParams(seed=6, max_tokens=40, grammar=Digits(30, 40)))
    busy.step()
    assert text(answer(busy, Digits(9, 20))) == alone
    unconstrained = engine()
    unconstrained.add("free", [9], SamplingParams(seed=5, max_tokens=40))
    wanted = text(drain(unconstrained)["free"])
    again = engine()
    again.add("free", [9], SamplingParams(seed=5, max_tokens=40))
    again.add("a", [8, 8], SamplingParams(seed=6, max_tokens=40, grammar=Digits(30, 40)))
    assert text(drain(again)["free"]) == wanted


def test_a_constrained_answer_has_no_drafts() -> None:
    built, _ = scripted_engine("12" * 20, eos=False, speculation=True)
    events = answer(built, Digits(30, 30), temperature=0)
    assert all(len(event.token_ids) == 1 for event in events)


def test_logprobs_are_of_what_the_grammar_allows() -> None:
    events = answer(engine(), Digits(6, 6), logprobs=20)
    for event in events:
        for told in event.logprobs:
            assert {id_ for id_, _ in told.top} == set(range(48, 58))
            assert sum(np.exp(value) for _, value in told.top) == pytest.approx(1, abs=1e-6)


def test_a_grammar_that_fails_fails_its_own_sequence() -> None:
    built = engine()
    built.add("good", [9], SamplingParams(seed=5, max_tokens=8, ignore_eos=True))
    events = answer(built, Digits(9, 9, fails_at=2))
    assert "wits' end" in str(events[-1].error)
    built = engine()
    built.add("good", [9], SamplingParams(seed=5, max_tokens=8, ignore_eos=True))
    built.add("a", [1], SamplingParams(grammar=Digits(9, 9, fails_at=2)))
    assert drain(built)["good"][-1].num_generated_tokens == 8


def test_a_token_that_the_grammar_does_not_know_fails_the_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def allow_all(_matcher: DigitMatcher, words: NDArray[np.uint32]) -> None:
        words[:] = 0xFFFFFFFF

    monkeypatch.setattr(DigitMatcher, "fill_mask", allow_all)
    events = answer(engine(), Digits(9, 9), temperature=0)
    assert "no digit" in str(events[-1].error)


def test_a_mask_of_nothing_fails_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    def allow_nothing(_matcher: DigitMatcher, words: NDArray[np.uint32]) -> None:
        words[:] = 0

    monkeypatch.setattr(DigitMatcher, "fill_mask", allow_nothing)
    assert "finite" in str(answer(engine(), Digits(9, 9))[-1].error)


def test_masks_are_there_also_when_a_step_fails_and_is_tried_again() -> None:
    built, model = scripted_engine("12" * 20, eos=False)
    model.failures[7] = RuntimeError("boom")
    built.add("bad", [7, 2, 3, 4], SamplingParams(temperature=0))
    events = answer(built, Digits(4, 4), temperature=0)
    assert text(events) == "1212" and events[-1].finish_reason == "stop"
