"""The compiled sampler against the PyTorch reference, at every level of this processor."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatserve.engine.sampler import Sampler, adjust, weights
from chatserve.engine.sampler_state import SamplerState, uniform
from chatserve.engine.sequence import SamplingParams
from chatserve.errors import DoesNotFit
from chatserve.kernels.library import Kernels
from chatserve.models.kernel_matrix import Team
from chatserve.models.kernel_sampler import KernelSampler

NUM_DRAWS = 24
# the kernels add float32 weights in blocks, the reference adds float64 ones one by one
ROUNDING = 1e-5


def pick(sampler: KernelSampler, logits: torch.Tensor, states: Sequence[SamplerState]) -> list[int]:
    return sampler.sample(logits.clone(), [state.address for state in states])


def is_beside_a_border(logits: torch.Tensor, state: SamplerState, ids: Sequence[int]) -> bool:
    """Whether rounding decides which of two ids is drawn."""
    shares = weights(adjust(logits, state), state.params).cumsum(0)
    shares = shares / shares[-1]
    point = uniform(state.seed, state.choice, state.position)
    borders = shares[[min(ids), max(ids) - 1]]
    return bool((borders - point).abs().min() < ROUNDING)


@st.composite
def rows_of_logits(draw: st.DrawFn) -> torch.Tensor:
    vocab_size = draw(st.sampled_from([1, 2, 7, 31, 300, 1023, 1024, 1025, 5003]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.0, 1e-3, 1.0, 4.0, 30.0, 1e30]))
    logits = torch.randn(vocab_size, generator=generator) * spread
    if draw(st.booleans()):
        logits = logits.round()  # many equal ones, and both zeros
    if draw(st.booleans()):
        logits[torch.rand(vocab_size, generator=generator) < 0.5] = -torch.inf
        logits[draw(st.integers(0, vocab_size - 1))] = draw(st.sampled_from([0.0, -0.0, 3.0]))
    return logits


sampling_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-4, 0.1, 0.7, 1.0, 2.0, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 40, 400, 2000, 10_000]),
    top_p=st.sampled_from([1.0, 1.0, 1e-9, 0.3, 0.9, 0.999999]),
    min_p=st.sampled_from([0.0, 0.0, 1e-6, 0.05, 1.0]),
)


@given(logits=rows_of_logits(), params=sampling_params, seed=st.integers(0, 2**31))
def test_draws_are_those_of_the_reference(
    kernels: Kernels, team: Team, logits: torch.Tensor, params: SamplingParams, seed: int
) -> None:
    vocab_size = len(logits)
    states = [
        SamplerState(params, range(position), seed=seed, vocab_size=vocab_size)
        for position in range(NUM_DRAWS)
    ]
    rows = logits.expand(NUM_DRAWS, -1)
    actual = pick(KernelSampler(kernels, team, vocab_size), rows, states)
    expected = Sampler().sample(rows.clone(), states)
    for state, ids in zip(states, zip(actual, expected, strict=True), strict=True):
        assert ids[0] == ids[1] or is_beside_a_border(logits, state, ids)


@given(
    prompt=st.lists(st.integers(0, 49), max_size=20),
    answer=st.lists(st.integers(0, 49), max_size=20),
    params=st.builds(
        SamplingParams,
        temperature=st.just(0.0),
        repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
        presence_penalty=st.sampled_from([0.0, 1.0]),
        frequency_penalty=st.sampled_from([0.0, 0.3]),
        logit_bias=st.dictionaries(st.integers(0, 49), st.floats(-5, 5), max_size=4),
        min_tokens=st.sampled_from([0, 10]),
        stop_token_ids=st.just((3, 4)),
    ),
    seed=st.integers(0, 1000),
)
def test_logits_are_changed_as_the_reference_changes_them_bit_for_bit(
    kernels: Kernels,
    team: Team,
    prompt: list[int],
    answer: list[int],
    params: SamplingParams,
    seed: int,
) -> None:
    state = SamplerState(params, prompt, seed=1, vocab_size=50)
    for token_id in answer:
        state.add(token_id)
    forbidden_ids = [7, 49]
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(seed))
    expected = adjust(logits[0], state, torch.tensor(forbidden_ids))
    sampler = KernelSampler(kernels, team, 50, forbidden_ids)
    assert sampler.sample(logits, [state.address]) == [int(expected.argmax())]
    assert torch.equal(logits[0], expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"top_p": 0.9}, {"top_k": 50}, {"top_k": 50, "top_p": 0.8}, {"min_p": 0.02}],
    ids=str,
)
def test_shares_of_draws_are_those_of_the_weights(
    kernels: Kernels, team: Team, options: dict[str, Any]
) -> None:
    vocab_size, num_draws = 2000, 20_000
    params = SamplingParams(temperature=1.3, **options)
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(5)) * 2
    sampler = KernelSampler(kernels, team, vocab_size)
    states = [SamplerState(params, range(i), seed=9, vocab_size=vocab_size) for i in range(200)]
    counts: Counter[int] = Counter()
    for _ in range(num_draws // len(states)):
        counts.update(pick(sampler, logits.expand(len(states), -1), states))
        for state in states:
            state.record.position += len(states)
    expected = weights(logits, params).numpy()
    expected *= num_draws / expected.sum()
    observed = np.array([counts[id_] for id_ in range(vocab_size)])
    assert not observed[expected == 0].any()
    # neighbours together, for chi-square wants some draws of each
    groups = (expected.cumsum() / 40).astype(int)
    observed, expected = np.bincount(groups, observed), np.bincount(groups, expected)
    observed, expected = observed[expected > 1], expected[expected > 1]
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    # Wilson & Hilferty: (chi2 / f)^(1/3) is normal; 3.3 deviations
    deviation = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (
        2 / (9 * freedom)
    ) ** 0.5
    assert abs(deviation) < 3.3


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_is_what_it_is_alone_on_any_number_of_threads(
    kernels: Kernels, num_threads: int
) -> None:
    vocab_size = 40_000  # enough work for all threads
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(30, vocab_size, generator=generator) * 3
    logits[5] = torch.nan
    logits[6, 100] = torch.inf
    kinds = [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.1}, {"temperature": 0.0}]
    states = [
        SamplerState(SamplingParams(**kinds[row % 5]), (1,), seed=row, vocab_size=vocab_size)  # type: ignore[arg-type]
        for row in range(30)
    ]
    alone = KernelSampler(kernels, Team(kernels, 1), vocab_size)
    expected = [pick(alone, logits[row : row + 1], states[row : row + 1])[0] for row in range(30)]
    assert expected[5] == expected[6] == -1 and min(expected[7:]) >= 0
    together = KernelSampler(kernels, Team(kernels, num_threads), vocab_size)
    assert pick(together, logits, states) == expected
    places = [20, 3, 29]
    changed = logits.clone()
    addresses = [states[place].address for place in places]
    assert together.sample(changed, addresses, places) == [expected[place] for place in places]


def test_what_stands_behind_the_vocabulary_does_not_count(kernels: Kernels, team: Team) -> None:
    wide = torch.full((2, 64), torch.nan)
    wide[:, :37] = torch.arange(37.0)
    sampler = KernelSampler(kernels, team, 37)
    for options in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.1}):
        params = SamplingParams(**options)  # type: ignore[arg-type]
        state = SamplerState(params, (), seed=0, vocab_size=37)
        assert sampler.sample(wide[:, :37], [state.address] * 2) == [36, 36]


@pytest.mark.parametrize("top_p", [0.5, 0.99])
def test_top_p_of_a_flat_vocabulary_keeps_its_first_part(
    kernels: Kernels, team: Team, top_p: float
) -> None:
    """No bound leaves few candidates here."""
    vocab_size = 10_000
    params = SamplingParams(top_p=top_p)
    states = [SamplerState(params, range(i), seed=1, vocab_size=vocab_size) for i in range(300)]
    ids = pick(KernelSampler(kernels, team, vocab_size), torch.zeros(300, vocab_size), states)
    assert max(ids) < vocab_size * top_p
    assert max(ids) > vocab_size * top_p * 0.97 and min(ids) < vocab_size * top_p * 0.03


@pytest.mark.parametrize(
    "change",
    [
        {"num_masked": -1},
        {"num_seen": -1},
        {"num_offsets": -5},
        {"temperature": 0.0},
        {"temperature": -1.0},
    ],
    ids=str,
)
def test_a_record_that_makes_no_sense_is_refused(
    kernels: Kernels, team: Team, change: dict[str, Any]
) -> None:
    state = SamplerState(SamplingParams(), (), seed=0, vocab_size=37)
    for name, value in change.items():
        setattr(state.record, name, value)
    logits = torch.zeros(1, 37)
    with pytest.raises(RuntimeError, match="refused"):
        KernelSampler(kernels, team, 37).sample(logits, [state.address])
    assert not logits.any()


ids_anywhere = st.lists(
    st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 3) | st.integers(695, 705), max_size=12
)


@given(seen=ids_anywhere, offset=ids_anywhere, masked=ids_anywhere)
def test_lists_with_any_ids_in_any_order_change_nothing_beside_the_row(
    kernels: Kernels, team: Team, seen: list[int], offset: list[int], masked: list[int]
) -> None:
    vocab_size = 700  # two blocks
    state = SamplerState(SamplingParams(temperature=0), (), seed=0, vocab_size=vocab_size)
    record, offsets = state.record, (ctypes.c_float * len(offset))(*[2.5] * len(offset))
    lists = [(ctypes.c_int32 * len(ids))(*ids) for ids in (seen, offset, masked)]
    record.seen_ids, record.offset_ids, record.masked_ids = map(ctypes.addressof, lists)
    record.num_seen, record.num_offsets, record.num_masked = map(len, lists)
    record.offsets, record.masked_until, record.repetition_penalty = ctypes.addressof(offsets), 9, 2
    logits = torch.ones(3, 1024)
    token_ids = KernelSampler(kernels, team, vocab_size).sample(logits, [state.address], [1])
    assert 0 <= token_ids[0] < vocab_size
    assert torch.equal(logits[::2], torch.ones(2, 1024)) and (logits[1, vocab_size:] == 1).all()


def test_rows_outside_the_logits_are_refused(kernels: Kernels, team: Team) -> None:
    sampler = KernelSampler(kernels, team, 37)
    address = SamplerState(SamplingParams(), (), seed=0, vocab_size=37).address
    for places in ([2], [-1]):
        with pytest.raises(RuntimeError, match="refused"):
            sampler.sample(torch.zeros(2, 37), [address], places)
    with pytest.raises(RuntimeError, match="refused"):
        sampler.sample(torch.zeros(2, 37), [address] * 3)


@pytest.mark.parametrize("forbidden_ids", [[37], [-1]])
def test_forbidden_ids_outside_the_vocabulary_are_refused(
    kernels: Kernels, team: Team, forbidden_ids: list[int]
) -> None:
    with pytest.raises(DoesNotFit):
        KernelSampler(kernels, team, 37, forbidden_ids)
