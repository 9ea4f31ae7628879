"""The engine of an encoder, step by step, on a network whose states tell what it was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from chatserve.engine.encoder_engine import EncoderEngine
from chatserve.engine.sequence import SamplingParams, TokenEvent
from chatserve.engine.step_size import fit_steps
from chatserve.errors import (
    ContextLengthExceeded,
    GenerationFailed,
    InvalidRequest,
    OutOfMemory,
    UnsupportedParameter,
)

MEAN = SamplingParams(max_tokens=0, pooling="mean")
BAD, SICK, FULL, LOST = 90, 91, 92, 93


class Network:
    """The state of a token is (its id, its place); some ids go wrong."""

    vocab_size = 100

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def states(self, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        self.batches.append([len(text) for text in texts])
        ids = {token_id for text in texts for token_id in text}
        if LOST in ids:
            raise torch.AcceleratorError("the device is lost")
        if FULL in ids:
            raise torch.OutOfMemoryError
        if BAD in ids:
            raise RuntimeError("no such row")
        states = [torch.tensor([[id_, place] for place, id_ in enumerate(t)]) for t in texts]
        return [
            rows.float().where(rows[:, :1] != SICK, float("nan")) if SICK in text else rows.float()
            for rows, text in zip(states, texts, strict=True)
        ]


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def engine(network: Network) -> EncoderEngine:
    return EncoderEngine(network, context_length=8, max_num_seqs=3, max_num_batched_tokens=12)


def drain(engine: EncoderEngine) -> dict[str, TokenEvent]:
    events = {}
    while engine.has_work:
        for event in engine.step():
            assert event.seq_id not in events and event.is_last
            events[event.seq_id] = event
    return events


def add(engine: EncoderEngine, *texts: Sequence[int], params: SamplingParams = MEAN) -> None:
    for index, text in enumerate(texts):
        engine.add(str(index), text, params)


@pytest.mark.parametrize(
    ("pooling", "vector"), [("mean", [4, 1]), ("last", [6, 2]), ("cls", [2, 0])]
)
def test_poolings(engine: EncoderEngine, pooling: Any, vector: list[float]) -> None:
    add(engine, [2, 4, 6], params=SamplingParams(max_tokens=0, pooling=pooling))
    [event] = engine.step()
    assert event.embedding is not None
    assert (event.embedding.tolist(), event.num_prompt_tokens) == (vector, 3)
    assert (event.finish_reason, engine.has_work) == ("length", False)


def test_a_step_takes_what_its_limits_allow_in_order(
    engine: EncoderEngine, network: Network
) -> None:
    add(engine, [1], [1] * 6, [1] * 7, [1], [1], [1], [1])
    events = drain(engine)
    assert network.batches == [[1, 6], [7], [1, 1, 1], [1]]
    assert list(events) == [str(index) for index in range(7)]


def test_a_text_longer_than_a_step_runs_alone(network: Network) -> None:
    engine = EncoderEngine(network, context_length=50, max_num_seqs=3, max_num_batched_tokens=12)
    add(engine, [1], [1] * 40, [1])
    assert len(drain(engine)) == 3
    assert network.batches == [[1], [40], [1]]


def test_a_slow_machine_takes_fewer_texts_in_a_step(
    engine: EncoderEngine, network: Network
) -> None:
    """Else a batch of them could look like a hang."""
    now = 0.0
    states = network.states

    def slowly(texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        nonlocal now
        now += 0.3 * sum(map(len, texts))
        return states(texts)

    network.states = slowly  # type: ignore[method-assign]
    fit_steps(engine, 12, 4.0, clock=lambda: now)
    add(engine, *([1, 2, 3] for _ in range(8)))
    longest = 0.0
    while engine.has_work:
        started_at = now
        engine.step()
        longest = max(longest, now - started_at)
    assert longest <= 1.0


def test_one_that_fails_takes_no_other_with_it(engine: EncoderEngine, network: Network) -> None:
    add(engine, [1], [BAD], [2])
    events = drain(engine)
    assert network.batches == [[1, 1, 1], [1], [1], [1]]
    assert isinstance(events["1"].error, GenerationFailed)
    assert [events[name].error for name in "02"] == [None, None]
    assert engine.num_running == 0


@pytest.mark.parametrize(("token_id", "kind"), [(SICK, GenerationFailed), (FULL, OutOfMemory)])
def test_faults_have_their_names(engine: EncoderEngine, token_id: int, kind: type) -> None:
    add(engine, [token_id])
    [event] = engine.step()
    assert isinstance(event.error, kind) and event.embedding is None


def test_a_lost_device_is_not_survived(engine: EncoderEngine) -> None:
    add(engine, [1], [LOST])
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_what_is_aborted_is_not_computed(engine: EncoderEngine, network: Network) -> None:
    add(engine, [1], [2, 2])
    engine.abort("0")
    engine.abort("unknown")
    assert list(drain(engine)) == ["1"]
    assert network.batches == [[2]]
    assert engine.step() == []


@pytest.mark.parametrize(
    ("text", "params", "error"),
    [
        ([1], SamplingParams(), UnsupportedParameter),
        ([], MEAN, InvalidRequest),
        ([100], MEAN, InvalidRequest),
        ([-1], MEAN, InvalidRequest),
        ([1] * 9, MEAN, ContextLengthExceeded),
    ],
)
def test_refused(
    engine: EncoderEngine, text: list[int], params: SamplingParams, error: type[Exception]
) -> None:
    with pytest.raises(error):
        engine.add("a", text, params)
    assert not engine.has_work


def test_the_longest_text_is_not(engine: EncoderEngine) -> None:
    engine.add("a", [99] * 8, MEAN)
    assert [event.error for event in engine.step()] == [None]


def test_keys_take_turns_and_batch_comes_later(engine: EncoderEngine) -> None:
    for index in range(4):
        engine.add(f"a{index}", [1], MEAN, salt=b"a")
    engine.add("x", [1], MEAN, salt=b"x", priority="batch")
    engine.add("b", [1], MEAN, salt=b"b")
    assert engine.places() == {"a0": 1, "b": 2, "a1": 3, "a2": 4, "a3": 5, "x": 6}
    engine.abort("a1")
    assert list(drain(engine)) == ["a0", "b", "a2", "a3", "x"]
