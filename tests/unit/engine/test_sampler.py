"""Sampling in PyTorch and in the kernels: exact filters, independent rows, the softmax's shares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatserve.engine.sampler import Sampler, adjust, build_sampler, weights
from chatserve.engine.sampler_state import SamplerState
from chatserve.engine.sequence import SamplingParams
from chatserve.models.kernel_sampler import build_kernel_sampler
from tests.unit.engine.ledger import LedgerModel

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])

Sample = Callable[..., list[int]]


def state(position: int = 1, seed: int = 1, **options: Any) -> SamplerState:
    """`prompt_ids` default to as many zeros as the position says."""
    prompt_ids = options.pop("prompt_ids", [0] * position)
    generated_ids: Sequence[int] = options.pop("generated_ids", ())
    names = {"choice", "end_ids", "vocab_size"} & set(options)
    rest: dict[str, Any] = {"vocab_size": 5, **{name: options.pop(name) for name in names}}
    built = SamplerState(SamplingParams(**options), prompt_ids, seed=seed, **rest)
    for token_id in generated_ids:
        built.add(token_id)
    return built


@pytest.fixture(params=["reference", "kernels"])
def sample(request: pytest.FixtureRequest) -> Sample:
    def run(
        logits: torch.Tensor,
        states: Sequence[SamplerState],
        places: Sequence[int] | None = None,
        forbidden_ids: Sequence[int] = (),
    ) -> list[int]:
        kernel = None
        if request.param == "kernels":
            kernel = build_kernel_sampler(logits.shape[1], forbidden_ids)
            if kernel is None:
                pytest.skip("there are no kernels")
        return Sampler(forbidden_ids, kernel).sample(logits.clone(), states, places)

    return run


def frequencies(sample: Sample, count: int = 2000, **options: Any) -> list[float]:
    states = [state(position, **options) for position in range(1, count + 1)]
    counts = Counter(sample(LOGITS.expand(count, -1), states))
    return [counts[token_id] / count for token_id in range(5)]


def test_without_kernels_the_reference_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATSERVE_KERNELS", "off")
    assert build_kernel_sampler(5) is None
    sampler = build_sampler(LedgerModel(num_ids=5), [4])
    assert sampler.sample(LOGITS[None].clone(), [state(temperature=0)]) == [0]


def test_greedy_takes_the_largest(sample: Sample) -> None:
    assert sample(LOGITS[None], [state(temperature=0)]) == [4]


def test_greedy_takes_the_lowest_id_of_equals(sample: Sample) -> None:
    logits = torch.zeros(1, 3000)
    logits[0, [7, 1500, 2999]] = 1.0
    assert sample(logits, [state(temperature=0, vocab_size=3000)]) == [7]


def test_frequencies_follow_the_softmax(sample: Sample) -> None:
    expected = torch.softmax(LOGITS / 0.8, 0).tolist()
    actual = frequencies(sample, temperature=0.8)
    chi_square = sum(
        2000 * (share - wanted) ** 2 / wanted
        for share, wanted in zip(actual, expected, strict=True)
    )
    assert chi_square < 18.5  # 4 degrees of freedom: all but one in a thousand


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {4, 0}),
        ({"top_k": 1}, {4}),
        ({"top_p": 0.6}, {4}),
        ({"top_p": 0.7}, {4, 0}),
        ({"top_p": 1e-9}, {4}),
        ({"min_p": 0.3}, {4, 0}),
        ({"min_p": 1.0}, {4}),
        ({"top_k": 3, "top_p": 0.95}, {4, 0, 1}),
        ({"top_k": 2, "top_p": 0.73}, {4}),  # .731 of what top-k leaves, .636 of all
        ({"top_k": 3, "min_p": 0.3}, {4, 0}),
        ({"top_p": 0.9, "min_p": 0.3}, {4, 0}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"logit_bias": {4: -100.0, 0: -100.0}}, {1, 2, 3}),
        ({"end_ids": (4, 0, 1), "min_tokens": 1}, {2, 3}),
    ],
)
def test_filters_keep_exactly(sample: Sample, options: dict[str, Any], kept: set[int]) -> None:
    # softmax of LOGITS: 4: .636, 0: .234, 1: .086, 2: .032, 3: .012
    actual = frequencies(sample, 1000, **options)
    assert {token_id for token_id, share in enumerate(actual) if share} == kept


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.6}])
def test_of_equal_logits_the_lower_ids_are_kept(sample: Sample, options: dict[str, Any]) -> None:
    logits = torch.tensor([0.0, 1.0, 1.0, -math.inf, 1.0, 1.0])
    states = [state(position, vocab_size=6, **options) for position in range(1, 300)]
    assert set(sample(logits.expand(299, -1), states)) == {1, 2, 4}


@given(
    logits=st.lists(st.integers(-6, 6).map(float) | st.just(-math.inf), min_size=1, max_size=40),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.1]),
    min_p=st.sampled_from([0.0, 0.01, 0.4]),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
)
def test_weights_of_the_reference_are_those_of_a_sorted_list(
    logits: list[float], top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits[0] = 0.0
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    best = max(logits)
    order = sorted(range(len(logits)), key=lambda id_: (-logits[id_], id_))
    mass = {id_: math.exp((logits[id_] - best) / temperature) for id_ in order}
    kept = order[: top_k or None]
    total, before, nucleus = math.fsum(mass[id_] for id_ in kept), 0.0, []
    for id_ in kept:
        if before < top_p * total * (1 - 1e-12):
            nucleus.append(id_)
        before += mass[id_]
    expected = [
        mass[id_] if id_ in nucleus and mass[id_] >= min_p * (1 - 1e-12) else 0.0
        for id_ in range(len(logits))
    ]
    assert weights(torch.tensor(logits), params).tolist() == pytest.approx(expected, rel=1e-9)


def test_a_row_gets_the_same_token_whatever_its_neighbours(sample: Sample) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 300, generator=generator)
    rows = [
        {"position": 5, "seed": 11, "temperature": 1.3},
        {"position": 9, "seed": 12, "top_p": 0.8},
        {"seed": 13, "top_k": 7, "presence_penalty": 0.5, "generated_ids": (3, 3, 4)},
        {"position": 7, "seed": 14, "temperature": 0},
        {"seed": 15, "min_p": 0.05, "repetition_penalty": 1.2, "prompt_ids": (1, 2)},
        {"position": 4, "seed": 16, "logit_bias": {8: 5.0}},
    ]
    states = [state(vocab_size=300, **options) for options in rows]
    alone = [sample(logits[index : index + 1], [item])[0] for index, item in enumerate(states)]
    assert sample(logits, states) == alone
    assert sample(logits.flip(0), states[::-1]) == alone[::-1]
    assert sample(logits, [states[4], states[1]], places=[4, 1]) == [alone[4], alone[1]]


def test_forbidden_ids_are_never_picked(sample: Sample) -> None:
    states = [state(position) for position in range(1, 200)]
    assert set(sample(LOGITS.expand(199, -1), states, forbidden_ids=[4, 1])) == {0, 2, 3}
    assert sample(LOGITS[None], [state(temperature=0)], forbidden_ids=[4]) == [0]


def test_repetition_penalty_counts_prompt_and_answer() -> None:
    item = state(repetition_penalty=2.0, prompt_ids=(0, 3), generated_ids=(0,))
    assert adjust(LOGITS, item).tolist() == [1.0, 1.0, 0.0, -2.0, 3.0]


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    item = state(
        presence_penalty=0.5, frequency_penalty=0.25, prompt_ids=(1,), generated_ids=(0, 0, 4)
    )
    assert adjust(LOGITS, item).tolist() == [1.0, 1.0, 0.0, -1.0, 2.25]


def test_logit_bias_is_added() -> None:
    assert adjust(LOGITS, state(logit_bias={2: 1.5}))[2] == 1.5


def test_adjusting_leaves_the_logits_of_the_caller_alone() -> None:
    before = LOGITS.clone()
    adjust(LOGITS, state(repetition_penalty=2.0, prompt_ids=(0,), logit_bias={1: 1.0}))
    assert torch.equal(LOGITS, before)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}])
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_logits_without_a_finite_value_give_minus_one_for_that_row_alone(
    sample: Sample, value: float, options: dict[str, Any]
) -> None:
    logits = torch.stack((torch.full((5,), value), LOGITS))
    rows = [state(**options), state(temperature=0)]
    assert sample(logits, rows) == [-1, 4]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1, 2500, 2999])
def test_one_bad_logit_among_finite_ones_fails_the_row(
    sample: Sample, place: int, value: float
) -> None:
    logits = torch.zeros(1, 3000)
    logits[0, place] = value
    assert sample(logits, [state(temperature=1.0)]) == [-1]
    assert sample(logits, [state(temperature=0)]) == [-1]


def test_no_rows_give_no_tokens(sample: Sample) -> None:
    assert sample(torch.empty(0, 5), []) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_may_have_any_float_type(sample: Sample, dtype: torch.dtype) -> None:
    assert sample(LOGITS[None].to(dtype), [state(temperature=0)]) == [4]


def test_logits_may_be_part_of_a_wider_tensor(sample: Sample) -> None:
    wide = torch.cat((LOGITS[None], torch.full((1, 3), 99.0)), dim=1).repeat(2, 1)
    assert sample(wide[:, :5], [state(temperature=0)] * 2) == [4, 4]
