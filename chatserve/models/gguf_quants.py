"""The tensor types of GGUF: block layouts, and how blocks of packed integers become float32.

Knows neither files nor names of weights. A tensor is a row of equal blocks; each block holds its
scales in front of (Q6_K: behind) its integers. Layouts: ggml-common.h of ggml; products and sums
are taken in the order of ggml's reference, so the results are equal bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chatserve.models.packing import Packing

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Dequantize = Callable[[Bytes, Floats], None]


@dataclass(frozen=True)
class TensorType:
    """How values lie in the file; `dtype` is what a reader hands out.

    `dequantize(blocks, out)` fills out (N, block_size) from blocks (N, block_bytes); None where the
    file already holds `dtype`. `packing`: ours that holds the same values.
    """

    name: str
    block_size: int
    block_bytes: int
    dtype: str
    dequantize: Dequantize | None = None
    packing: Packing | None = None


def _half(blocks: Bytes, start: int) -> Floats:
    """The float16 at byte `start` of each block, (N, 1)."""
    return blocks[:, start : start + 2].view("<f2").astype(np.float32)


def _nibbles(packed: Bytes, out: npt.NDArray[Any]) -> None:
    """Low nibbles of packed (..., P) to out (..., 0, P), high ones to out (..., 1, P)."""
    np.bitwise_and(packed, 15, out=out[..., 0, :])
    np.right_shift(packed, 4, out=out[..., 1, :])


def _fifth_bits(blocks: Bytes, start: int) -> Bytes:
    """The 32 bits at byte `start` of each block, each moved to bit 4: (N, 32)."""
    bits = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    return np.left_shift(bits, 4, out=bits)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks, 0), out=out)


def _q4_0(blocks: Bytes, out: Floats) -> None:
    quants = np.empty(out.shape, np.uint8)
    _nibbles(blocks[:, 2:], quants.reshape(-1, 2, 16))
    signed = quants.view(np.int8)
    signed -= 8
    np.multiply(signed, _half(blocks, 0), out=out)


def _q4_1(blocks: Bytes, out: Floats) -> None:
    quants = np.empty(out.shape, np.uint8)
    _nibbles(blocks[:, 4:], quants.reshape(-1, 2, 16))
    np.multiply(quants, _half(blocks, 0), out=out)
    out += _half(blocks, 2)


def _q5_0(blocks: Bytes, out: Floats) -> None:
    quants = np.empty(out.shape, np.uint8)
    _nibbles(blocks[:, 6:], quants.reshape(-1, 2, 16))
    quants |= _fifth_bits(blocks, 2)
    signed = quants.view(np.int8)
    signed -= 16
    np.multiply(signed, _half(blocks, 0), out=out)


def _q5_1(blocks: Bytes, out: Floats) -> None:
    quants = np.empty(out.shape, np.uint8)
    _nibbles(blocks[:, 8:], quants.reshape(-1, 2, 16))
    quants |= _fifth_bits(blocks, 4)
    np.multiply(quants, _half(blocks, 0), out=out)
    out += _half(blocks, 2)


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scale and minimum of each 32 values of Q4_K and Q5_K, two arrays (N, 8, 1).

    Bytes 4 to 15 pack eight 6-bit scales and eight 6-bit minima: those of 0 to 3 whole in bytes
    0-3 and 4-7, those of 4 to 7 with low nibbles in bytes 8-11 and top bits above the former.
    """
    first, second, nibbles = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((first & 63, (nibbles & 15) | ((first >> 2) & 48)), axis=1)
    minima = np.concatenate((second & 63, (nibbles >> 4) | ((second >> 2) & 48)), axis=1)
    return (_half(blocks, 0) * scales)[..., None], (_half(blocks, 2) * minima)[..., None]


def _scale_k(quants: Bytes, blocks: Bytes, out: Floats) -> None:
    scales, minima = _k_scales(blocks)
    groups = out.reshape(-1, 8, 32)
    np.multiply(quants.reshape(-1, 8, 32), scales, out=groups)
    groups -= minima


def _q4_k(blocks: Bytes, out: Floats) -> None:
    quants = np.empty(out.shape, np.uint8)
    _nibbles(blocks[:, 16:].reshape(-1, 4, 32), quants.reshape(-1, 4, 2, 32))
    _scale_k(quants, blocks, out)


def _q5_k(blocks: Bytes, out: Floats) -> None:
    quants = np.empty(out.shape, np.uint8)
    _nibbles(blocks[:, 48:].reshape(-1, 4, 32), quants.reshape(-1, 4, 2, 32))
    by_group = quants.reshape(-1, 8, 32)
    for group in range(8):  # bit `group` of byte i is the fifth bit of value i of that group
        by_group[:, group] |= ((blocks[:, 16:48] >> group) & 1) << 4
    _scale_k(quants, blocks, out)


def _q6_k(blocks: Bytes, out: Floats) -> None:
    quants = np.empty(out.shape, np.uint8)
    _nibbles(blocks[:, :128].reshape(-1, 2, 64), quants.reshape(-1, 2, 2, 64))
    high = blocks[:, 128:192].reshape(-1, 2, 32)
    by_group = quants.reshape(-1, 2, 4, 32)
    for group in range(4):  # bits 2 * group and up of byte i are the top bits of value i
        by_group[:, :, group] |= ((high >> (2 * group)) & 3) << 4
    signed = quants.view(np.int8)
    signed -= 32
    scales = (_half(blocks, 208) * blocks[:, 192:208].view(np.int8))[..., None]
    np.multiply(signed.reshape(-1, 16, 16), scales, out=out.reshape(-1, 16, 16))


# The numbers are ggml's `enum ggml_type`.
TENSOR_TYPES = {
    0: TensorType("F32", 1, 4, "float32"),
    1: TensorType("F16", 1, 2, "float16"),
    30: TensorType("BF16", 1, 2, "bfloat16"),
    2: TensorType("Q4_0", 32, 18, "float32", _q4_0, Packing(4, is_grouped=True)),
    3: TensorType("Q4_1", 32, 20, "float32", _q4_1, Packing(4, is_grouped=True, has_minima=True)),
    6: TensorType("Q5_0", 32, 22, "float32", _q5_0),
    7: TensorType("Q5_1", 32, 24, "float32", _q5_1),
    8: TensorType("Q8_0", 32, 34, "float32", _q8_0, Packing(8, is_grouped=True)),
    12: TensorType("Q4_K", 256, 144, "float32", _q4_k),
    13: TensorType("Q5_K", 256, 176, "float32", _q5_k),
    14: TensorType("Q6_K", 256, 210, "float32", _q6_k),
}
_UNSUPPORTED = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def type_name(number: int) -> str:
    """What people call the type of this number, for messages."""
    if number in TENSOR_TYPES:
        return TENSOR_TYPES[number].name
    return _UNSUPPORTED.get(number, f"number {number}")
