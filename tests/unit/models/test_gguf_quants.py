"""Dequantisation, judged by llama.cpp's own Python package: equal bit by bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from chatserve.models.gguf_quants import TENSOR_TYPES, type_name

PACKED = {number: kind for number, kind in TENSOR_TYPES.items() if kind.dequantize}
WRITABLE = [2, 3, 6, 7, 8]  # Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: what the package can quantise itself
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def dequantize(number: int, blocks: np.ndarray) -> np.ndarray:
    kind = PACKED[number]
    out = np.full((len(blocks), kind.block_size), np.nan, np.float32)
    assert kind.dequantize is not None
    kind.dequantize(blocks, out)
    return out


def judge(number: int, blocks: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(number))


@pytest.mark.parametrize("number", PACKED, ids=type_name)
def test_random_blocks_give_the_same_bits_as_the_reference(number: int) -> None:
    kind = PACKED[number]
    rng = np.random.default_rng(number)
    blocks = rng.integers(0, 256, (300, kind.block_bytes), dtype=np.uint8)
    for start in HALVES.get(kind.name, (0,)):
        scales = rng.standard_normal((300, 1)).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    found, expected = dequantize(number, blocks), judge(number, blocks)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("number", WRITABLE, ids=type_name)
def test_quantised_weights_come_back_within_half_a_step(number: int) -> None:
    weights = np.random.default_rng(0).standard_normal((64, PACKED[number].block_size), np.float32)
    blocks = gguf.quants.quantize(weights, gguf.GGMLQuantizationType(number))
    found = dequantize(number, blocks)
    assert np.array_equal(found, judge(number, blocks))
    steps = {2: 7, 3: 15, 6: 15, 7: 31, 8: 127 * 2}[number]
    reach = np.ptp(weights, axis=1).max()
    assert np.abs(found - weights).max() <= reach / steps


@pytest.mark.parametrize("number", TENSOR_TYPES, ids=type_name)
def test_sizes_and_numbers_are_those_of_the_reference(number: int) -> None:
    kind, judged = TENSOR_TYPES[number], gguf.GGMLQuantizationType(number)
    assert kind.name == judged.name
    assert (kind.block_size, kind.block_bytes) == gguf.GGML_QUANT_SIZES[judged]


def test_every_type_of_the_reference_has_its_name() -> None:
    for judged in gguf.GGMLQuantizationType:
        assert type_name(judged.value) == judged.name
    assert type_name(12345) == "number 12345"
