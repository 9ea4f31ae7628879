"""The engine with a scripted model: ends, limits, faults. No HTTP, no asyncio."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from chatserve.engine.engine import Engine
from chatserve.engine.faults import Faults
from chatserve.engine.sequence import SamplingParams, TokenEvent
from chatserve.errors import (
    ContextLengthExceeded,
    DoesNotFit,
    EngineStopped,
    GenerationFailed,
    InvalidRequest,
    OutOfMemory,
)
from tests import tiny
from tests.unit.engine.scripted import (
    GREEDY,
    NUM_KV_TOKENS,
    PROMPT_LEN,
    ByteTokenizer,
    Scripted,
    drain,
    scripted_engine,
    text,
)


def generate(engine: Engine, **requests: SamplingParams) -> dict[str, list[TokenEvent]]:
    for index, (seq_id, params) in enumerate(requests.items()):
        engine.add(seq_id, [index, 1, 2, 3], params)
    return drain(engine)


def test_a_sequence_ends_at_its_eos_with_stop() -> None:
    engine, _ = scripted_engine("Hello 🦙")
    events = generate(engine, a=GREEDY)["a"]
    assert text(events) == "Hello 🦙"
    last = events[-1]
    assert (last.finish_reason, last.num_prompt_tokens) == ("stop", PROMPT_LEN)
    assert last.num_generated_tokens == len("Hello 🦙".encode()) + 1
    assert [event.is_last for event in events].count(True) == 1


def test_max_tokens_ends_with_length_and_exact_usage() -> None:
    engine, _ = scripted_engine("Hello")
    events = generate(engine, a=SamplingParams(temperature=0, max_tokens=3))["a"]
    assert (text(events), events[-1].finish_reason) == ("Hel", "length")
    assert events[-1].num_generated_tokens == 3


def test_eos_as_the_last_allowed_token_is_a_stop() -> None:
    engine, _ = scripted_engine("Hi")
    events = generate(engine, a=SamplingParams(temperature=0, max_tokens=3))["a"]
    assert (text(events), events[-1].finish_reason) == ("Hi", "stop")


def test_a_stop_string_ends_the_sequence_and_is_not_shown() -> None:
    engine, _ = scripted_engine("Hello### Human")
    params = SamplingParams(temperature=0, max_tokens=64, stop=("###",))
    events = generate(engine, a=params)["a"]
    assert (text(events), events[-1].finish_reason) == ("Hello", "stop")
    assert not any("#" in event.text for event in events)


def test_a_half_stop_string_at_the_end_is_shown() -> None:
    engine, _ = scripted_engine("Hello##")
    params = SamplingParams(temperature=0, max_tokens=64, stop=("###",))
    assert text(generate(engine, a=params)["a"]) == "Hello##"


def test_stop_token_ids_end_the_sequence() -> None:
    engine, _ = scripted_engine("abc")
    params = SamplingParams(temperature=0, max_tokens=64, stop_token_ids=(ord("b"),))
    assert text(generate(engine, a=params)["a"]) == "a"


def test_ignore_eos_goes_on_to_max_tokens() -> None:
    engine, _ = scripted_engine("ab")
    params = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
    events = generate(engine, a=params)["a"]
    assert (text(events), events[-1].finish_reason) == ("ababa", "length")


def test_min_tokens_holds_back_the_end() -> None:
    engine, _ = scripted_engine("")
    params = SamplingParams(temperature=0, max_tokens=9, min_tokens=5)
    events = generate(engine, a=params)["a"]
    assert events[-1].num_generated_tokens == 6


def test_leading_space_is_stripped_when_asked() -> None:
    engine, _ = scripted_engine(" Hello")
    engine.add("a", [0, 1, 2, 3], GREEDY, strip_leading_space=True)
    engine.add("b", [0, 1, 2, 3], GREEDY)
    events = drain(engine)
    assert (text(events["a"]), text(events["b"])) == ("Hello", " Hello")


def test_abort_frees_everything_at_every_stage() -> None:
    engine, _ = scripted_engine("x", eos=False, max_num_seqs=2, max_num_batched_tokens=4)
    baseline = engine.num_free_kv_tokens
    for seq_id in ("decode", "prefill", "waiting"):
        engine.add(seq_id, [1] * (3 if seq_id == "decode" else 9), GREEDY)
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (2, 1)
    for seq_id in ("waiting", "prefill", "decode", "never heard of"):
        engine.abort(seq_id)
    assert (engine.num_free_kv_tokens, engine.has_work) == (baseline, False)
    assert engine.step() == []


def test_one_failing_sequence_leaves_its_neighbours_unchanged() -> None:
    engine, model = scripted_engine("Hello")
    model.failures[1] = RuntimeError("boom")
    events = generate(engine, a=GREEDY, b=GREEDY, c=GREEDY)
    assert (text(events["a"]), text(events["c"])) == ("Hello", "Hello")
    assert isinstance(events["b"][-1].error, GenerationFailed)
    assert engine.num_free_kv_tokens == NUM_KV_TOKENS


def test_out_of_memory_fails_that_sequence_alone() -> None:
    engine, model = scripted_engine("Hello")
    model.failures[0] = torch.OutOfMemoryError("CUDA out of memory")
    events = generate(engine, a=GREEDY, b=GREEDY)
    assert isinstance(events["a"][-1].error, OutOfMemory)
    assert text(events["b"]) == "Hello"


def test_nan_logits_fail_that_sequence_alone() -> None:
    engine, model = scripted_engine("Hello")
    model.nan_first_ids.add(0)
    events = generate(engine, a=GREEDY, b=GREEDY)
    assert isinstance(events["a"][-1].error, GenerationFailed)
    assert text(events["b"]) == "Hello"


def test_a_sequence_larger_than_the_cache_is_refused_at_once() -> None:
    engine, _ = scripted_engine("x")
    with pytest.raises(ContextLengthExceeded):
        engine.add("a", [1] * 9_990, GREEDY)


def test_whatever_a_model_raises_its_neighbours_go_on() -> None:
    engine, model = scripted_engine("Hello")
    model.failures[1] = IndexError("index 320 is out of bounds")
    events = generate(engine, a=GREEDY, b=GREEDY)
    assert text(events["a"]) == "Hello"
    assert isinstance(events["b"][-1].error, GenerationFailed)


def test_a_lost_device_is_not_survived() -> None:
    engine, model = scripted_engine("Hello")
    model.failures[0] = torch.AcceleratorError("device-side assert", 1)
    engine.add("a", [0, 1, 2, 3], GREEDY)
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_forbidden_ids_beyond_the_models_rows_are_ignored() -> None:
    class Larger(ByteTokenizer):
        forbidden_ids = frozenset({tiny.VOCAB_SIZE, 10**6})
        eos_ids = frozenset({tiny.EOS_ID, 10**6})

    engine = Engine(Scripted("Hello"), Larger(), num_kv_tokens=1000)
    params = SamplingParams(temperature=0, max_tokens=64, min_tokens=2)
    assert text(generate(engine, a=params)["a"]) == "Hello"


@pytest.mark.parametrize("prompt", [[], [tiny.VOCAB_SIZE], [-1], [3, 10**6]])
def test_a_prompt_the_model_cannot_read_is_refused(prompt: list[int]) -> None:
    engine, _ = scripted_engine("x")
    with pytest.raises(InvalidRequest):
        engine.add("a", prompt, GREEDY)
    assert not engine.has_work


def fail(error: Exception) -> Callable[..., torch.Tensor]:
    def forward(*_: object) -> torch.Tensor:
        raise error

    return forward


NO_MEMORY = [
    MemoryError(),
    DoesNotFit("no memory for the kernels' buffers"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_whoever_finds_no_memory_is_told_so_and_its_neighbours_go_on(error: Exception) -> None:
    engine, model = scripted_engine("Hello")
    model.failures[0] = error
    events = generate(engine, a=GREEDY, b=GREEDY)
    assert isinstance(events["a"][-1].error, OutOfMemory)
    assert text(events["b"]) == "Hello"


def test_a_request_that_fails_each_time_it_comes_costs_nobody_the_engine() -> None:
    """Three faults in a row, and more: the engine tries itself out and finds nothing wrong."""
    engine, model = scripted_engine("Hello")
    model.failures[1] = RuntimeError("a prompt that no network can read")
    model.nan_first_ids.add(2)
    for number in range(5):
        for first_id in (1, 2):
            engine.add(f"{first_id}.{number}", [first_id, 1, 2, 3], GREEDY)
            [event] = engine.step()
            assert isinstance(event.error, GenerationFailed)
    assert engine.num_free_kv_tokens == NUM_KV_TOKENS
    assert text(generate(engine, a=GREEDY)["a"]) == "Hello"


@pytest.mark.parametrize("num_at_once", [1, 2, 8])
@pytest.mark.parametrize(
    "forward",
    [
        fail(RuntimeError("driver lost")),
        fail(MemoryError()),
        lambda batch, _: torch.full((len(batch.output_rows), tiny.VOCAB_SIZE), torch.nan),
    ],
    ids=["raises", "no memory", "NaN"],
)
def test_an_engine_that_fails_at_whatever_it_is_given_is_replaced(
    forward: Callable[..., torch.Tensor], num_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = scripted_engine("Hello")
    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(EngineStopped):
        for number in range(3):
            for each in range(num_at_once):
                engine.add(f"{number}.{each}", [0, 1, 2, 3], GREEDY)
            events = engine.step()
            assert all(event.error is not None for event in events)
    assert num_at_once == 1 or number == 0


def test_a_token_between_faults_is_a_new_start(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model = scripted_engine("Hello")
    engine.add("good", [0, 1, 2, 3], replace(GREEDY, ignore_eos=True))
    model.failures[1] = RuntimeError("boom")
    monkeypatch.setattr(Faults, "_try_out", fail(AssertionError("nothing is wrong with it")))
    for number in range(6):
        engine.add(str(number), [1, 1, 2, 3], GREEDY)
        assert len(engine.step()) == 2
