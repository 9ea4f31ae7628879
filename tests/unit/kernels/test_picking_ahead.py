"""Tokens that a network's step picks while the logits are at hand: the same as those picked after.

Here a step's logits are computed twice, and once somebody has been at them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from chatserve.engine.sampler_state import SamplerState
from chatserve.engine.sequence import SamplingParams
from chatserve.kernels.library import Kernels
from chatserve.models.batch import Batch, Segment
from chatserve.models.kernel_matrix import Team
from chatserve.models.kernel_sampler import Ahead, KernelSampler
from chatserve.models.llama_kernels import KernelKVPool, KernelLlama
from chatserve.models.packing import Packing
from tests.unit.kernels.networks import BLOCK_SIZE, config, random_network

VOCAB_SIZE = 1300  # six blocks of logits, the last not full
FORBIDDEN_IDS = (1299, 7, 300)
KINDS = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.8),
    SamplingParams(top_p=0.9),
    SamplingParams(top_k=40, min_p=0.01),
    SamplingParams(min_p=0.05),
    SamplingParams(
        top_p=0.95, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2,
        logit_bias={700: 2.0, 3: -100.0}, stop_token_ids=(5, 1000), min_tokens=400,
    ),
)  # fmt: skip
BATCH = Batch(
    [11 * row for row in range(12)], [0, 1] * 6, [Segment(2 * s, 2, 0, [s]) for s in range(6)],
    [1, 3, 5, 7, 9, 11],
)  # fmt: skip


@pytest.fixture(scope="module")
def network(kernels: Kernels) -> KernelLlama:
    packing = Packing(8, is_grouped=False)
    return random_network(kernels, packing, config(vocab_size=VOCAB_SIZE), num_threads=2)


@pytest.fixture(scope="module")
def pool(network: KernelLlama) -> KernelKVPool:
    return network.build_kv_pool(8, BLOCK_SIZE)


@pytest.fixture
def sampler(kernels: Kernels, network: KernelLlama) -> KernelSampler:
    return KernelSampler(kernels, network.team, VOCAB_SIZE, FORBIDDEN_IDS)


def states(params: Sequence[SamplingParams] = KINDS) -> list[SamplerState]:
    made = []
    for seed, param in enumerate(params):
        state = SamplerState(param, range(0, 900, 7), seed=seed, vocab_size=VOCAB_SIZE)
        for token_id in range(0, 1290, 11):
            state.add(token_id)
        made.append(state)
    return made


def addresses(states: Sequence[SamplerState]) -> list[int]:
    return [state.address for state in states]


def ahead(sampler: KernelSampler, states: Sequence[SamplerState]) -> Batch:
    return replace(BATCH, ahead=Ahead(sampler, addresses(states)))


def picked_after(
    network: KernelLlama, pool: KernelKVPool, sampler: KernelSampler, states: Sequence[SamplerState]
) -> list[int]:
    return sampler.sample(network.forward(BATCH, pool), addresses(states))


def test_the_tokens_are_those_picked_after_and_known_before(
    network: KernelLlama, pool: KernelKVPool, sampler: KernelSampler
) -> None:
    for seed in range(5):
        kinds = states((*KINDS[seed:], *KINDS[:seed]))
        expected = picked_after(network, pool, sampler, kinds)
        logits = network.forward(ahead(sampler, kinds), pool)
        logits.zero_()  # nobody looks at them any more
        assert sampler.sample(logits, addresses(kinds)) == expected
        assert len(set(expected)) > 1


def test_logits_are_changed_once_and_alike(
    network: KernelLlama, pool: KernelKVPool, sampler: KernelSampler
) -> None:
    kinds = states()
    logits = network.forward(BATCH, pool)
    sampler.sample(logits, addresses(kinds))
    expected = logits.clone()
    logits = network.forward(ahead(sampler, kinds), pool)
    assert torch.equal(logits, expected)
    sampler.sample(logits, addresses(kinds))
    assert torch.equal(logits, expected)


def test_a_token_is_given_away_once_and_to_its_row_and_position_only(
    network: KernelLlama, pool: KernelKVPool, sampler: KernelSampler
) -> None:
    greedy = states([SamplingParams(temperature=0)] * 6)
    expected = picked_after(network, pool, sampler, greedy)
    logits = network.forward(ahead(sampler, greedy), pool)
    logits.zero_()
    moved = greedy[1]
    moved.add(5)
    other = states([SamplingParams(temperature=0)])[0]
    assert sampler.sample(logits, [greedy[0].address], [0]) == expected[:1]
    assert sampler.sample(logits, [greedy[0].address], [0]) == [0]  # the first of equals
    assert sampler.sample(logits, [moved.address], [1]) == [0]
    assert sampler.sample(logits, [other.address], [2]) == [0]
    assert sampler.sample(logits.clone(), [greedy[3].address], [3]) == [0]
    assert sampler.sample(logits, addresses(greedy[4:]), [4, 5]) == expected[4:]


def test_rows_without_a_sampling_keep_their_logits(
    network: KernelLlama, pool: KernelKVPool, sampler: KernelSampler
) -> None:
    kinds = states([KINDS[-1]] * 6)
    plain = network.forward(BATCH, pool).clone()
    some = [0, kinds[1].address, 0, 0, kinds[4].address, 0]
    logits = network.forward(replace(BATCH, ahead=Ahead(sampler, some)), pool)
    same = [torch.equal(logits[row], plain[row]) for row in range(6)]
    assert same == [True, False, True, True, False, True]
    expected = picked_after(network, pool, sampler, kinds)
    logits = network.forward(replace(BATCH, ahead=Ahead(sampler, some)), pool)
    assert sampler.sample(logits, addresses(kinds)) == expected


def test_a_step_without_any_forgets_those_of_the_one_before(
    network: KernelLlama, pool: KernelKVPool, sampler: KernelSampler
) -> None:
    greedy = states([SamplingParams(temperature=0)] * 6)
    network.forward(ahead(sampler, greedy), pool)
    logits = network.forward(replace(BATCH, ahead=Ahead(sampler, [])), pool)
    logits.zero_()
    assert sampler.sample(logits, addresses(greedy)) == [0] * 6


def test_a_row_that_is_not_finite_fails_alone(
    kernels: Kernels, network: KernelLlama, pool: KernelKVPool
) -> None:
    every_id = range(VOCAB_SIZE)
    greedy = states([SamplingParams(temperature=0), *[SamplingParams(top_p=0.9)] * 5])
    bad = KernelSampler(kernels, network.team, VOCAB_SIZE)
    kept = SamplerState(
        SamplingParams(logit_bias=dict.fromkeys(every_id, float("-inf"))), (), seed=0,
        vocab_size=VOCAB_SIZE,
    )  # fmt: skip
    broken = SamplerState(
        SamplingParams(logit_bias={1290: float("nan")}), (), seed=0, vocab_size=VOCAB_SIZE
    )
    rows = [greedy[0], kept, broken, *greedy[3:]]
    expected = picked_after(network, pool, bad, rows)
    logits = network.forward(ahead(bad, rows), pool)
    assert bad.sample(logits, addresses(rows)) == expected
    assert [token_id < 0 for token_id in expected] == [False, True, True, False, False, False]


def test_a_sampler_of_another_team_or_vocabulary_is_refused(
    kernels: Kernels, network: KernelLlama, pool: KernelKVPool
) -> None:
    for sampler in (
        KernelSampler(kernels, Team(kernels, 2), VOCAB_SIZE),
        KernelSampler(kernels, network.team, VOCAB_SIZE - 1),
    ):
        with pytest.raises(RuntimeError, match="refused"):
            network.forward(ahead(sampler, states()), pool)


def test_a_record_that_points_outside_the_vocabulary_is_refused(
    network: KernelLlama, pool: KernelKVPool, sampler: KernelSampler
) -> None:
    kinds = states()
    kinds[3].record.temperature = -1.0
    with pytest.raises(RuntimeError, match="refused"):
        network.forward(ahead(sampler, kinds), pool)
