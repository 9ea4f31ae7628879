"""A token that a step picks while the logits are at hand is the one picked after the step."""

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


def pick_ahead(
    network: KernelLlama, pool: KernelKVPool, sampler: KernelSampler, samplings: Sequence[int]
) -> tuple[torch.Tensor, list[int]]:
    """The logits that a step leaves, and the tokens that it picked."""
    ahead = Ahead(sampler, samplings)
    logits = network.forward(replace(BATCH, ahead=ahead), pool)
    assert ahead.token_ids is not None
    return logits, list(ahead.token_ids)


def pick_after(
    network: KernelLlama, pool: KernelKVPool, sampler: KernelSampler, samplings: Sequence[int]
) -> tuple[torch.Tensor, list[int]]:
    logits = network.forward(BATCH, pool)
    return logits, sampler.sample(logits, samplings)


def test_tokens_and_changed_logits_are_those_of_sampling_after_the_step(
    network: KernelLlama, pool: KernelKVPool, sampler: KernelSampler
) -> None:
    for shift in range(len(KINDS)):
        kinds = states((*KINDS[shift:], *KINDS[:shift]))
        samplings = addresses(kinds)
        logits, expected = pick_after(network, pool, sampler, samplings)
        changed = logits.clone()
        logits, picked = pick_ahead(network, pool, sampler, samplings)
        assert picked == expected
        assert torch.equal(logits, changed)
        assert len(set(expected)) > 1


def test_rows_without_a_sampling_keep_their_logits(
    network: KernelLlama, pool: KernelKVPool, sampler: KernelSampler
) -> None:
    kinds = states([KINDS[-1]] * 6)
    samplings = addresses(kinds)
    plain = network.forward(BATCH, pool).clone()
    _, expected = pick_after(network, pool, sampler, samplings)
    some = [0, kinds[1].address, 0, 0, kinds[4].address, 0]
    logits, picked = pick_ahead(network, pool, sampler, some)
    same = [torch.equal(logits[row], plain[row]) for row in range(6)]
    assert same == [True, False, True, True, False, True]
    assert (picked[1], picked[4]) == (expected[1], expected[4])


def test_a_step_without_output_rows_picks_nothing(
    network: KernelLlama, pool: KernelKVPool, sampler: KernelSampler
) -> None:
    ahead = Ahead(sampler, [])
    logits = network.forward(replace(BATCH, output_rows=[], ahead=ahead), pool)
    assert len(logits) == 0 and ahead.token_ids is not None and len(ahead.token_ids) == 0


def test_a_row_that_is_not_finite_fails_alone(
    kernels: Kernels, network: KernelLlama, pool: KernelKVPool
) -> None:
    sampler = KernelSampler(kernels, network.team, VOCAB_SIZE)
    healthy = states([SamplingParams(temperature=0), *[SamplingParams(top_p=0.9)] * 3])
    nothing_left, broken, endless = (
        SamplerState(SamplingParams(logit_bias=bias), (), seed=0, vocab_size=VOCAB_SIZE)
        for bias in (
            dict.fromkeys(range(VOCAB_SIZE), float("-inf")),
            {1290: float("nan")},
            {1299: float("inf")},
        )
    )
    rows = [healthy[0], nothing_left, broken, endless, *healthy[2:]]
    _, expected = pick_after(network, pool, sampler, addresses(rows))
    _, picked = pick_ahead(network, pool, sampler, addresses(rows))
    assert picked == expected
    assert [token_id < 0 for token_id in picked] == [False, True, True, True, False, False]


def test_a_sampler_of_another_team_or_vocabulary_is_refused(
    kernels: Kernels, network: KernelLlama, pool: KernelKVPool
) -> None:
    kinds = states()
    for sampler in (
        KernelSampler(kernels, Team(kernels, 2), VOCAB_SIZE),
        KernelSampler(kernels, network.team, VOCAB_SIZE - 1),
    ):
        with pytest.raises(RuntimeError, match="refused"):
            pick_ahead(network, pool, sampler, addresses(kinds))


def test_a_record_that_points_outside_the_vocabulary_is_refused(
    network: KernelLlama, pool: KernelKVPool, sampler: KernelSampler
) -> None:
    kinds = states()
    kinds[3].record.temperature = -1.0
    with pytest.raises(RuntimeError, match="refused"):
        pick_ahead(network, pool, sampler, addresses(kinds))
