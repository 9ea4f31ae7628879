"""How likely a token was: the compiled kernels against the PyTorch reference, at every level."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatserve.engine.sampler import Sampler, row_logprobs, weights
from chatserve.engine.sampler_state import UNCHANGED, SamplerState
from chatserve.engine.sequence import SamplingParams, TokenLogprobs
from chatserve.kernels.library import Kernels
from chatserve.models.kernel_matrix import Team
from chatserve.models.kernel_sampler import KernelSampler
from tests.unit.kernels.test_sampling import rows_of_logits, sampling_params

CLOSE = 1e-5


def logprobs(
    kernels: Kernels,
    team: Team,
    logits: torch.Tensor,
    states: Sequence[SamplerState],
    token_ids: Sequence[int],
    num_tops: Sequence[int],
) -> list[TokenLogprobs | None]:
    kernel = KernelSampler(kernels, team, logits.shape[1])
    return Sampler((), kernel).logprobs(logits, states, range(len(states)), token_ids, num_tops)


@given(
    logits=rows_of_logits(),
    params=sampling_params,
    num_top=st.integers(0, 20),
    place=st.floats(0, 1, exclude_max=True),
)
def test_kernels_say_what_the_reference_says(
    kernels: Kernels,
    team: Team,
    logits: torch.Tensor,
    params: SamplingParams,
    num_top: int,
    place: float,
) -> None:
    vocab_size = len(logits)
    num_top = min(num_top, vocab_size)
    token_id = int(place * vocab_size)
    state = SamplerState(params, (), seed=0, vocab_size=vocab_size)
    [actual] = logprobs(kernels, team, logits[None].clone(), [state], [token_id], [num_top])
    expected = row_logprobs(logits, params, token_id, num_top)
    assert actual is not None and expected is not None
    assert is_close(actual.logprob, expected.logprob)
    # rounding may decide which of the last is kept, and so how much weight there is
    fewer, more = sorted([actual.top, expected.top], key=len)
    extra = sum(math.exp(value) for _, value in more[len(fewer) :])
    assert len(more) - len(fewer) <= 1 or extra < CLOSE
    for (id_, value), (wanted_id, wanted) in zip(actual.top, expected.top, strict=False):
        assert id_ == wanted_id and is_close(value, wanted)


def is_close(value: float, wanted: float) -> bool:
    if math.isinf(wanted) or wanted < -80:  # next to nothing; e^-87 is the smallest weight
        return value < -70
    return abs(value - wanted) <= CLOSE * max(1, -wanted)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.5, top_p=0.8),
        SamplingParams(top_k=7),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=1.5, top_k=12, top_p=0.9, min_p=0.05),
    ],
)
def test_all_that_may_be_picked_adds_up_to_one(
    kernels: Kernels, team: Team, params: SamplingParams
) -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1)) * 3
    state = SamplerState(params, (), seed=0, vocab_size=300)
    [told] = logprobs(kernels, team, logits, [state], [0], [300])
    assert told is not None
    plain = SamplingParams() if params.is_greedy else params
    assert {id_ for id_, _ in told.top} == set(weights(logits[0], plain).nonzero()[:, 0].tolist())
    assert sum(math.exp(value) for _, value in told.top) == pytest.approx(1, abs=1e-6)


def test_tops_fall_and_equal_ones_rise_by_id(kernels: Kernels, team: Team) -> None:
    logits = torch.zeros(1, 2000)
    logits[0, [1500, 7, 40]] = 2.0
    [told] = logprobs(kernels, team, logits, [UNCHANGED], [3], [5])
    assert told is not None
    assert [id_ for id_, _ in told.top] == [7, 40, 1500, 0, 1]


def test_each_row_is_told_for_itself(kernels: Kernels, team: Team) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(40, 30_000, generator=generator) * 4
    kinds = [SamplingParams(), SamplingParams(temperature=0.3, top_p=0.7), SamplingParams(top_k=3)]
    states = [SamplerState(kinds[r % 3], (), seed=r, vocab_size=30_000) for r in range(40)]
    token_ids, num_tops, most = list(range(40)), [r % 6 for r in range(40)], (99, 99, 3)
    together = logprobs(kernels, team, logits.clone(), states, token_ids, num_tops)
    for row in range(40):
        [alone] = logprobs(
            kernels, team, logits[row : row + 1].clone(), [states[row]], [token_ids[row]],
            [num_tops[row]],
        )  # fmt: skip
        assert alone == together[row]
        assert alone is not None
        assert row % 3 == 1 or len(alone.top) == min(num_tops[row], most[row % 3])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_without_finite_logits_has_none(kernels: Kernels, team: Team, value: float) -> None:
    logits = torch.zeros(2, 64)
    logits[0, :] = value
    told = logprobs(kernels, team, logits, [UNCHANGED] * 2, [1, 1], [2, 2])
    assert told[0] is None
    assert told[1] is not None and told[1].logprob == pytest.approx(-math.log(64), abs=1e-6)
    assert row_logprobs(logits[0], SamplingParams(), 1, 2) is None


def test_ids_outside_the_vocabulary_are_refused(kernels: Kernels, team: Team) -> None:
    with pytest.raises(RuntimeError, match="refused their arguments"):
        logprobs(kernels, team, torch.zeros(1, 64), [UNCHANGED], [64], [1])
    with pytest.raises(RuntimeError, match="refused their arguments"):
        logprobs(kernels, team, torch.zeros(1, 64), [UNCHANGED], [1], [65])


@given(
    vocab_size=st.sampled_from([1, 31, 32, 33, 1024, 1030, 3000]), seed=st.integers(0, 2**31),
    density=st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
)  # fmt: skip
def test_a_mask_leaves_what_it_allows(
    kernels: Kernels, team: Team, vocab_size: int, seed: int, density: float
) -> None:
    rng = np.random.default_rng(seed)
    allowed = rng.random(vocab_size) < density
    params = SamplingParams(temperature=0, logit_bias={0: 100.0}, grammar=AllowedGrammar(allowed))
    state = SamplerState(params, (), seed=0, vocab_size=vocab_size)
    assert state.matcher is not None
    state.matcher.fill_mask(state.allowed)
    logits = torch.from_numpy(rng.standard_normal((1, vocab_size), dtype=np.float32))
    expected = logits.clone()
    expected[0, 0] += 100
    expected[0, torch.from_numpy(~allowed)] = -torch.inf
    actual = logits.clone()
    [token_id] = KernelSampler(kernels, team, vocab_size).sample(actual, [state.address])
    assert torch.equal(actual, expected)
    assert Sampler().sample(logits, [state]) == [token_id]
    assert token_id == (int(expected[0].argmax()) if allowed.any() else -1)


class AllowedGrammar:
    """Always the same ids."""

    is_finished = False

    def __init__(self, allowed: np.ndarray) -> None:  # type: ignore[type-arg]
        self._allowed = allowed

    def matcher(self) -> AllowedGrammar:
        return self

    def fill_mask(self, words: np.ndarray) -> None:  # type: ignore[type-arg]
        bits = np.zeros(32 * len(words), np.uint8)
        bits[: len(self._allowed)] = self._allowed
        words[:] = np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token_id: int) -> None:
        raise AssertionError(f"nothing is accepted here, also not {token_id}")
