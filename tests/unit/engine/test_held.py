"""A sequence that is held says the same as one that never was."""

from __future__ import annotations

import pytest

from chatserve.engine.engine import Engine
from chatserve.engine.sequence import SamplingParams
from tests.unit.engine.ledger import LedgerModel
from tests.unit.engine.scripted import ByteTokenizer, drain

PARAMS = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
PROMPTS = {name: [ord(name)] * 30 for name in "abc"}


def build(num_kv_tokens: int) -> tuple[Engine, LedgerModel]:
    model = LedgerModel()
    return Engine(model, ByteTokenizer(), num_kv_tokens=num_kv_tokens, max_num_seqs=2), model


def ids_alone(name: str) -> list[int]:
    engine, _ = build(6400)
    engine.add(name, PROMPTS[name], PARAMS)
    return [id_ for event in drain(engine)[name] for id_ in event.token_ids]


@pytest.mark.parametrize("num_kv_tokens", [6400, 160], ids=["its blocks stay", "and are taken"])
@pytest.mark.parametrize("held_after", [1, 2, 17])
def test_text_and_blocks_after_being_held(num_kv_tokens: int, held_after: int) -> None:
    engine, _ = build(num_kv_tokens)
    num_free = engine.num_free_kv_tokens
    for name, prompt in PROMPTS.items():
        engine.add(name, prompt, PARAMS)
    said: dict[str, list[int]] = {name: [] for name in PROMPTS}
    num_steps = 0
    while engine.has_work or engine.num_held:
        num_steps += 1
        if num_steps == held_after:
            engine.hold("a")
            assert engine.num_held == 1
        if not engine.has_work:
            assert engine.step() == []
            # what others had to say has been said meanwhile
            assert len(said["b"]) == len(said["c"]) == 40 > len(said["a"])
            engine.release("a")
        for event in engine.step():
            said[event.seq_id] += event.token_ids
    assert said == {name: ids_alone(name) for name in PROMPTS}
    assert engine.num_free_kv_tokens == num_free


def test_a_held_sequence_can_be_aborted_and_unknown_ones_are_left_alone() -> None:
    engine, _ = build(6400)
    num_free = engine.num_free_kv_tokens
    engine.add("a", PROMPTS["a"], PARAMS)
    engine.step()
    engine.hold("a")
    engine.abort("a")
    assert (engine.num_held, engine.has_work) == (0, False)
    assert engine.num_free_kv_tokens == num_free
    engine.hold("a")
    engine.release("a")
    assert engine.num_held == 0
