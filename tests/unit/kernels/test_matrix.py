"""Packed matrices against numpy: error per weight, products, and what is not a number."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatserve.kernels import library
from chatserve.kernels.library import Kernels
from chatserve.models.kernel_matrix import GateUpRows, KernelMatrix, Team
from chatserve.models.packing import FINE, FOUR_BITS, Packing
from tests.unit.kernels.networks import quantised

GROUP = library.GROUP
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_HALF = 65504.0
NORMAL = float(np.finfo(np.float32).tiny)

row_counts = st.sampled_from((1, 2, 31, 32, 33, 63, 64, 65, 161))
column_counts = st.sampled_from((32, 64, 96, 160, 320, 544))
seeds = st.integers(0, 2**32 - 1)


def weights(rows: int, columns: int, seed: int, *, most: float = 3e38) -> torch.Tensor:
    """Rows of many magnitudes; some are zero, subnormal, constant, or hold one huge value."""
    draw = np.random.default_rng(seed)
    values = draw.standard_normal((rows, columns)) * 10.0 ** draw.integers(-6, 4, (rows, 1))
    kinds = draw.integers(0, 10, rows)
    values[kinds == 0] = 0
    values[kinds == 1] *= 1e-42
    values[kinds == 2] = values[kinds == 2, :1]
    huge = np.flatnonzero(kinds == 3)
    values[huge, draw.integers(0, columns, len(huge))] = draw.choice((-1, 1), len(huge)) * most
    values[kinds == 4, : columns // 2] = 0
    return torch.tensor(np.clip(values, -most, most), dtype=torch.float32)


def packed(kernels: Kernels, team: Team, values: torch.Tensor, packing: Packing) -> KernelMatrix:
    matrix = KernelMatrix(kernels, team, *values.shape, packing)
    matrix.load_rows(0, values)
    return matrix


def unpacked(matrix: KernelMatrix) -> torch.Tensor:
    return torch.stack([matrix.row(index) for index in range(matrix.shape[0])])


def allowed_error(values: np.ndarray, packing: Packing) -> np.ndarray:
    """Half a step of the codes, by weight; the step comes from the row or from its group."""
    if not packing.is_grouped:
        most = np.abs(values).max(axis=1, keepdims=True)
        # a row whose scale would be subnormal is zero
        return np.where(most < 127 * NORMAL, most, most / 254) * (1 + 1e-5) * np.ones_like(values)
    groups = values.reshape(len(values), -1, GROUP)
    if packing.scale_bits == 8:
        return allowed_by_steps_of_the_row(values)
    if packing.has_minima:
        least = groups.min(axis=2, keepdims=True)
        scale = (groups.max(axis=2, keepdims=True) - least) / 15
        # both are rounded to the nearest half, the minimum within the range of halves
        shift = np.abs(np.float16(np.clip(least, -LARGEST_HALF, LARGEST_HALF)) - least)
        error = scale / 2 + 15 * (scale * 2**-11 + 2**-25) + shift
        return (error * (1 + 1e-5) * np.ones_like(groups)).reshape(values.shape)
    most = np.abs(groups).max(axis=2, keepdims=True)
    # rounded up to a half: 2^-10 of itself, 2^-24 where halves are subnormal
    scale = most / (127 if packing.bits == 8 else 8) * (1 + 2**-10) + 2**-24
    if packing.bits == 8:
        return (scale / 2 * (1 + 1e-5) * np.ones_like(groups)).reshape(values.shape)
    # the value of largest magnitude has code -8; on the other side codes end at 7
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=2)[..., None], axis=2)
    beyond = -groups * np.sign(extreme) - 7.5 * most / 8
    return (scale / 2 * (1 + 1e-5) + np.maximum(beyond, 0)).reshape(values.shape)


def allowed_by_steps_of_the_row(values: np.ndarray) -> np.ndarray:
    """For scales and zero points of 8 bits: the ends are drawn in by a tenth of the range at most.

    A fit moves them by some more; a scale is a step of the row too small, a zero point half a
    sixteenth of a code off.
    """
    most = np.abs(values).max(axis=1, keepdims=True)
    groups = values.reshape(len(values), -1, GROUP)
    reach = np.maximum(groups.max(axis=2, keepdims=True), 0)
    reach = reach - np.minimum(groups.min(axis=2, keepdims=True), 0)
    step_of_row = reach.max(axis=1, keepdims=True) / 15 / 255 * 1.2
    error = reach * (0.105 + 0.06) + 15 * step_of_row
    allowed = (error * np.ones_like(groups)).reshape(values.shape)
    return np.where(most < 65536 * NORMAL, most, allowed)


@settings(max_examples=25)
@given(row_counts, column_counts, seeds, st.sampled_from(DTYPES))
def test_a_packed_weight_is_within_half_a_step(
    kernels: Kernels, team: Team, packing: Packing, rows: int, columns: int, seed: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    most = 6e4 if dtype == torch.float16 else 1e5 if packing.is_grouped else 3e38
    values = weights(rows, columns, seed, most=most).to(dtype)
    error = (unpacked(packed(kernels, team, values, packing)) - values.float()).abs().numpy()
    exact = values.double().numpy()
    assert (error <= allowed_error(exact, packing)).all()


@settings(max_examples=25)
@given(row_counts, column_counts, seeds)
def test_weights_of_a_q4_1_file_come_back_to_the_bit(
    kernels: Kernels, team: Team, rows: int, columns: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    shape = (rows, columns // GROUP, 1)
    scale = np.float16(10.0 ** draw.uniform(-6, 1, shape))
    minimum = np.float16(np.float32(scale) * draw.uniform(-100, 100, shape))
    codes = draw.integers(0, 16, (rows, columns // GROUP, GROUP))
    codes[..., 5], codes[..., 17] = 0, 15  # as every quantiser of Q4_1 leaves a group
    values = codes.astype(np.float32) * np.float32(scale) + np.float32(minimum)
    weight = torch.from_numpy(values.reshape(rows, columns))
    packing = Packing(4, is_grouped=True, has_minima=True)
    assert torch.equal(unpacked(packed(kernels, team, weight, packing)), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_packed_alike_together_and_one_by_one(
    kernels: Kernels, team: Team, packing: Packing, dtype: torch.dtype
) -> None:
    values = weights(96, 1056, seed=3, most=6e4).to(dtype)
    alone, together = (KernelMatrix(kernels, team, 96, 1056, packing) for _ in range(2))
    for index in range(96):
        alone.load_rows(index, values[index : index + 1])
    for start in range(0, 96, 21):  # across panels, and ending within them
        together.load_apart(start, values[start : start + 21])
    assert unpacked(alone).equal(unpacked(together))
    halves = [KernelMatrix(kernels, team, 96, 1056, packing) for _ in range(2)]
    for step, matrix in zip((1, 21), halves, strict=True):
        rows = GateUpRows(matrix)
        for first in (0, 48):  # gate, then up
            for start in range(first, first + 48, step):
                end = min(start + step, first + 48)
                rows.load_apart(start, values[start:end])
    assert unpacked(halves[0]).equal(unpacked(halves[1]))
    places = [row // 16 * 32 + row % 16 for row in range(48)]
    assert unpacked(halves[1])[places].equal(unpacked(alone)[:48])


@pytest.mark.parametrize("num_groups", [1, 15, 33])
def test_a_group_is_packed_alike_wherever_it_lies_in_its_row(
    kernels: Kernels, team: Team, packing: Packing, num_groups: int
) -> None:
    """Several are fitted side by side, and a row in pieces of sixteen."""
    values = weights(40, num_groups * GROUP, seed=4, most=6e4).view(40, num_groups, GROUP)
    order = np.random.default_rng(4).permutation(num_groups)
    here = unpacked(packed(kernels, team, values.flatten(1), packing))
    there = unpacked(packed(kernels, team, values[:, order].flatten(1), packing))
    assert there.equal(here.view_as(values)[:, order].flatten(1))


@settings(max_examples=10)
@given(seeds, st.sampled_from((1e-30, 1e-3, 1.0, 1e30)))
def test_zero_points_fit_weights_of_any_kind_better_than_what_takes_the_same_room(
    kernels: Kernels, team: Team, seed: int, size: float
) -> None:
    draw = np.random.default_rng(seed)
    kinds = {  # how much is left of the error
        "normal": (draw.standard_normal((96, 512)), 0.75),
        "long tails": (draw.standard_t(5, (96, 512)), 0.68),
        "shifted": (draw.standard_normal((96, 512)) + 0.5, 0.75),
        "groups of many sizes": (
            draw.standard_normal((96, 512)) * 2.0 ** draw.integers(-4, 1, (96, 16)).repeat(32, 1),
            0.75,
        ),
    }
    for name, (values, share) in kinds.items():
        plain = torch.from_numpy(values).float()

        def error(packing: Packing, factor: float, plain: torch.Tensor = plain) -> float:
            near = unpacked(packed(kernels, team, plain * factor, packing)) / factor
            return float((near - plain).double().square().mean())

        symmetric = error(Packing(4, is_grouped=True), 1.0)
        assert error(FOUR_BITS, size) < share * symmetric, name


@settings(max_examples=30)
@given(seeds, st.floats(-10, 10), st.sampled_from((0.0, 1e-4, 1e-2, 0.1, 1.0)))
def test_groups_far_from_zero_keep_the_steps_that_reach_from_there(
    kernels: Kernels, team: Team, seed: int, mean: float, spread: float
) -> None:
    """A line that fits the weights alone may have its zero point where there is no code."""
    draw = torch.Generator().manual_seed(seed)
    weights = mean + spread * torch.randn(8, 32, generator=draw)
    near = unpacked(packed(kernels, team, weights, FOUR_BITS))
    for row, errors in zip(weights, near - weights, strict=True):
        step = float(row.clamp(min=0).max() - row.clamp(max=0).min()) / 15
        assert float(errors.square().mean().sqrt()) <= 0.5 * step + 1e-6


@settings(max_examples=10)
@given(row_counts, column_counts, seeds)
def test_zero_points_are_nearly_exact_for_weights_that_have_four_bits_already(
    kernels: Kernels, team: Team, rows: int, columns: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    shape = (rows, columns // GROUP, 1)
    scale = draw.uniform(0.3, 1, shape)
    codes = draw.integers(0, 16, (rows, columns // GROUP, GROUP))
    codes[..., 5], codes[..., 17] = 0, 15
    values = (codes - draw.uniform(0, 15, shape)) * scale
    weight = torch.from_numpy(values.reshape(rows, columns)).float()
    error = (unpacked(packed(kernels, team, weight, FOUR_BITS)) - weight).abs()
    steps = torch.from_numpy((scale * np.ones(codes.shape)).reshape(rows, columns)).float()
    # half a sixteenth of a code, and at its far end a scale of 1 in 255
    assert (error <= steps * (1 / 32 + 15 / 2 / 255 / 0.3 + 1e-3)).all()


@settings(max_examples=10)
@given(seeds)
def test_codes_are_near_the_best_of_their_kind(
    kernels: Kernels, team: Team, packing: Packing, seed: int
) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal((64, 256))).float()
    error = (unpacked(packed(kernels, team, values, packing)) - values).square().mean().sqrt()
    # a uniform error within half a step: step / sqrt(12), steps of some 3 or 2 deviations
    assert error < (0.012 if packing.bits == 8 else 0.12)


@settings(max_examples=15)
@given(row_counts, column_counts, seeds, st.data())
def test_a_matrix_loaded_in_pieces_by_any_number_of_threads_is_the_same(
    kernels: Kernels, team: Team, packing: Packing, rows: int, columns: int, seed: int,
    data: st.DataObject,
) -> None:  # fmt: skip
    values = weights(rows, columns, seed, most=1e5)
    whole = unpacked(packed(kernels, team, values, packing))
    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=4))})
    pieces = KernelMatrix(kernels, team, rows, columns, packing)
    for start, end in itertools.pairwise(cuts):
        pieces.load_rows(start, values[start:end])
    assert torch.equal(unpacked(pieces), whole)
    for num_threads in (1, 3, 5):
        other = Team(kernels, num_threads)
        assert torch.equal(unpacked(packed(kernels, other, values, packing)), whole)


def test_rows_that_are_not_contiguous_or_of_another_dtype_are_taken_as_they_read(
    kernels: Kernels, team: Team, packing: Packing
) -> None:
    values = weights(64, 64, 1, most=1e5)
    expected = unpacked(packed(kernels, team, values, packing))
    assert torch.equal(unpacked(packed(kernels, team, values.T.contiguous().T, packing)), expected)
    assert torch.equal(unpacked(packed(kernels, team, values.double(), packing)), expected)


@settings(max_examples=10)
@given(st.sampled_from((32, 64, 96, 160)), seeds)
def test_gate_and_up_share_panels_sixteen_rows_each(
    kernels: Kernels, team: Team, packing: Packing, half: int, seed: int
) -> None:
    values = weights(2 * half, 64, seed, most=1e5)
    plain = unpacked(packed(kernels, team, values, packing))
    mixed = KernelMatrix(kernels, team, 2 * half, 64, packing)
    rows = GateUpRows(mixed)
    rows.load_rows(0, values[:half])
    rows.load_rows(half, values[half : half + 5])
    rows.load_rows(half + 5, values[half + 5 :])
    panels = unpacked(mixed).view(-1, 2, 16, 64)
    assert torch.equal(panels[:, 0].reshape(half, 64), plain[:half])
    assert torch.equal(panels[:, 1].reshape(half, 64), plain[half:])


def summands(weight: torch.Tensor, packing: Packing) -> torch.Tensor:
    """How large the parts of each weight may be: a minimum and what is added to it may cancel."""
    if not packing.has_minima:
        return weight.abs()
    most = weight.view(len(weight), -1, GROUP).abs().amax(-1, keepdim=True)
    return (3 * most).expand(-1, -1, GROUP).reshape(weight.shape)


@settings(max_examples=25)
@given(st.integers(1, 40), row_counts, column_counts, seeds)
def test_a_product_is_that_of_the_packed_weights_and_the_quantised_rows(
    kernels: Kernels, team: Team, packing: Packing, num_rows: int, rows: int, columns: int,
    seed: int,
) -> None:  # fmt: skip
    draw = np.random.default_rng(seed)
    matrix = packed(kernels, team, weights(rows, columns, seed, most=1e3), packing)
    x = torch.from_numpy(draw.standard_normal((num_rows, columns)) * draw.choice((1e-3, 1, 50)))
    x = x.float()
    x[draw.random(num_rows) < 0.1] = 0
    near, weight = quantised(x, packing), unpacked(matrix).double()
    sizes = near.abs() @ summands(weight, packing).T
    error = (matrix.multiply(x).double() - near @ weight.T).abs()
    assert (error <= sizes * 1e-5 + 1e-30).all()


def test_fine_activations_are_two_hundred_times_nearer_to_the_true_ones(
    kernels: Kernels, team: Team
) -> None:
    values = torch.randn(64, 320, generator=torch.Generator().manual_seed(4))
    x = torch.randn(9, 320, generator=torch.Generator().manual_seed(5))

    def error(packing: Packing) -> float:
        matrix = packed(kernels, team, values, packing)
        exact = x.double() @ unpacked(matrix).double().T
        return float((matrix.multiply(x).double() - exact).abs().max())

    assert error(FINE) < error(Packing(is_grouped=True)) / 150


@settings(max_examples=15)
@given(st.integers(2, 40), row_counts, column_counts, seeds)
def test_a_row_of_a_product_does_not_depend_on_the_others(
    kernels: Kernels, team: Team, packing: Packing, num_rows: int, rows: int, columns: int,
    seed: int,
) -> None:  # fmt: skip
    matrix = packed(kernels, team, weights(rows, columns, seed, most=1e3), packing)
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((num_rows, columns))).float()
    together = matrix.multiply(x)
    alone = torch.cat([matrix.multiply(row[None]) for row in x])
    assert torch.equal(together, alone)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(num_rows))
    assert torch.equal(matrix.multiply(x[order]), together[order])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_spoils_its_own_output_alone(
    kernels: Kernels, team: Team, packing: Packing, bad: float
) -> None:
    values = torch.randn(65, 96, generator=torch.Generator().manual_seed(1))
    clean = packed(kernels, team, values, packing)
    values[33, 70] = bad
    spoilt = packed(kernels, team, values, packing)
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(2))
    expected, actual = clean.multiply(x), spoilt.multiply(x)
    assert not actual[:, 33].isfinite().any()
    expected[:, 33] = actual[:, 33] = 0
    assert torch.equal(actual, expected)
    assert not spoilt.row(33).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_activation_that_is_no_number_spoils_its_own_row_alone(
    kernels: Kernels, team: Team, packing: Packing, bad: float
) -> None:
    matrix = packed(kernels, team, weights(64, 96, 3, most=1e3), packing)
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(2))
    expected = matrix.multiply(x)
    x[5, 40] = bad
    actual = matrix.multiply(x)
    assert actual[5].isnan().all()
    expected[5] = actual[5] = 0
    assert torch.equal(actual, expected)


def test_activations_too_small_for_a_scale_are_zero(
    kernels: Kernels, team: Team, packing: Packing
) -> None:
    matrix = packed(kernels, team, torch.ones(32, 64), packing)
    x = torch.full((3, 64), 1e-44)
    x[1] = 0
    assert torch.equal(matrix.multiply(x), torch.zeros(3, 32))


def test_grouped_weights_beyond_the_halves_are_clipped_to_the_largest(
    kernels: Kernels, team: Team
) -> None:
    values = torch.zeros(2, 32)
    values[0, 3], values[1, 3] = 3e38, -3e38
    for bits, top in ((8, 127), (4, 8)):
        matrix = packed(kernels, team, values, Packing(bits, is_grouped=True))
        assert unpacked(matrix)[:, 3].tolist() == [top * LARGEST_HALF, -top * LARGEST_HALF]


def test_the_size_of_a_matrix_is_its_codes_and_scales(
    kernels: Kernels, team: Team, packing: Packing
) -> None:
    matrix = KernelMatrix(kernels, team, 256, 1024, packing)
    weights = 256 * 1024 * packing.bytes_per_weight
    assert weights <= matrix.num_bytes <= weights + 4096
