"""What sampling remembers of a sequence, against a naive count of all its tokens."""

from __future__ import annotations

import ctypes
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatserve.engine.sampler_state import SamplerState, split_mix, uniform
from chatserve.engine.sequence import SamplingParams

VOCAB_SIZE = 20
token_ids = st.integers(0, VOCAB_SIZE - 1)


def offsets_of(state: SamplerState) -> dict[int, float]:
    assert state.offset_ids.tolist() == sorted(set(state.offset_ids.tolist()))
    return dict(zip(state.offset_ids.tolist(), state.offsets.tolist(), strict=True))


@given(
    prompt=st.lists(token_ids, min_size=1, max_size=30),
    answer=st.lists(token_ids, max_size=200),
    presence=st.sampled_from([0.0, 0.5, -2.0]),
    frequency=st.sampled_from([0.0, 0.25, -1.0]),
    repetition=st.sampled_from([1.0, 1.3]),
    bias=st.dictionaries(token_ids, st.sampled_from([-100.0, 1.5]), max_size=5),
)
def test_a_state_grown_by_tokens_is_what_counting_them_all_gives(
    prompt: list[int],
    answer: list[int],
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
) -> None:
    params = SamplingParams(
        presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition,
        logit_bias=bias,
    )  # fmt: skip
    state = SamplerState(params, prompt, seed=1, vocab_size=VOCAB_SIZE)
    for token_id in answer:
        state.add(token_id)
    expected = Counter(bias)
    for token_id, count in Counter(answer).items() if presence or frequency else ():
        expected[token_id] -= presence + frequency * count
    assert offsets_of(state) == pytest.approx(dict(expected), abs=1e-6)
    seen = {*prompt, *answer} if repetition != 1 else set()
    assert state.seen_ids.tolist() == sorted(seen)
    assert state.position == len(prompt) + len(answer)
    record = state.record
    assert (record.num_seen, record.num_offsets) == (len(seen), len(expected))
    for address, array in (
        (record.seen_ids, state.seen_ids),
        (record.offset_ids, state.offset_ids),
        (record.offsets, state.offsets),
    ):
        assert not len(array) or ctypes.string_at(address, array.nbytes) == array.tobytes()


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 7), st.integers(0, 2**31))
def test_uniform_depends_on_its_arguments_alone(seed: int, choice: int, position: int) -> None:
    number = uniform(seed, choice, position)
    assert 0 <= number < 1
    assert number == uniform(seed, choice, position)
    assert number != uniform(seed, choice + 1, position)
    assert number != uniform(seed, choice, position + 1)


def test_the_streams_are_split_mix_64() -> None:
    """The numbers that the authors' C code prints for the seed 1234567."""
    assert [split_mix(1234567, index) for index in range(3)] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423,
    ]  # fmt: skip


def test_uniform_is_pinned() -> None:
    """A change here changes every seeded answer: it needs a note in the CHANGELOG."""
    assert uniform(1, 0, 0) == 0.36818951565166946


def test_uniform_numbers_of_neighbouring_seeds_choices_and_positions_are_uniform() -> None:
    numbers = np.array(
        [
            uniform(seed, choice, position)
            for seed in range(20)
            for choice in range(5)
            for position in range(200)
        ]
    )
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    chi_square = float(((counts - 400) ** 2 / 400).sum())
    assert 25 < chi_square < 85  # 49 degrees of freedom: all but one in a thousand
    pairs = numbers.reshape(-1, 200)
    assert abs(np.corrcoef(pairs[:, :-1].ravel(), pairs[:, 1:].ravel())[0, 1]) < 0.03


def test_ends_are_masked_until_there_are_min_tokens() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=(3, 99))
    state = SamplerState(params, [1, 1, 1], seed=0, end_ids=[7, VOCAB_SIZE], vocab_size=VOCAB_SIZE)
    masked = []
    for token_id in (1, 1, 1):
        masked.append(state.masked_ids.tolist())
        state.add(token_id)
    assert masked == [[3, 7], [3, 7], []]


def test_plain_greedy_is_greedy_that_nothing_changes() -> None:
    def is_plain(**options: object) -> bool:
        params = SamplingParams(**{"temperature": 0.0, **options})  # type: ignore[arg-type]
        return SamplerState(params, [1], seed=0, end_ids=[2], vocab_size=5).is_plain_greedy

    assert is_plain() and is_plain(presence_penalty=1.0)
    assert not is_plain(temperature=1.0)
    assert not is_plain(min_tokens=1)
    assert not is_plain(logit_bias={1: 2.0})
    assert not is_plain(repetition_penalty=1.1)


def test_min_p_reaches_the_kernels_as_a_margin_of_logits() -> None:
    params = SamplingParams(temperature=0.5, min_p=0.25)
    record = SamplerState(params, [1], seed=0, vocab_size=5).record
    assert record.min_p_margin == 0.5 * math.log(0.25)
    assert (
        SamplerState(SamplingParams(), [1], seed=0, vocab_size=5).record.min_p_margin == -math.inf
    )
