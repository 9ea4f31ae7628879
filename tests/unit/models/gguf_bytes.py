"""GGUF files made by hand, byte by byte, so that each field can be wrong; and whole models."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL = range(8)
STRING, ARRAY, UINT64, INT64, FLOAT64 = range(8, 13)
F32, F16, Q4_0, Q4_1, Q8_0, Q4_K, BF16 = 0, 1, 2, 3, 8, 12, 30


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data)) + data


def key_value(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return string(key) + u32(kind) + payload


def array(key: str, kind: int, count: int, payload: bytes) -> bytes:
    return key_value(key, ARRAY, u32(kind) + u64(count) + payload)


def tensor(name: str | bytes, dims: Iterable[int], kind: int = F32, offset: int = 0) -> bytes:
    """`dims` in GGUF's order: the row's length first."""
    dims = tuple(dims)
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def gguf_bytes(
    keys: Iterable[bytes] = (),
    tensors: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: bytes = u32(3),
    num_tensors: int | None = None,
    num_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file of these parts; counts follow from them unless they are given."""
    keys, tensors = list(keys), list(tensors)
    counts = u64(len(tensors) if num_tensors is None else num_tensors)
    counts += u64(len(keys) if num_keys is None else num_keys)
    header = magic + version + counts + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data


def write_model(
    path: Path,
    architecture: str,
    tensors: Mapping[str, np.ndarray],
    keys: Mapping[str, Any] | None = None,
    *,
    kind: int | None = None,
    tensors_per_file: int = 0,
) -> Path:
    """A model of 2 layers, 8 wide, 2 heads, 1 key/value head, written by llama.cpp's own package.

    `keys` without a general or tokenizer prefix are the architecture's; None leaves one out.
    Tensors of bytes are blocks of the type `kind`. `tensors_per_file`: write several files,
    `NAME-00001-of-0000N.gguf`.
    """
    import gguf

    defaults = {
        "block_count": 2, "context_length": 64, "embedding_length": 8, "feed_forward_length": 12,
        "attention.head_count": 2, "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b"],
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_per_file)
    for key, value in {**defaults, **(keys or {})}.items():
        full = key if key.startswith(("general.", "tokenizer.", "split.")) else None
        _add(writer, full or f"{architecture}.{key}", value)
    for name, values in tensors.items():
        blocks = gguf.GGMLQuantizationType(kind) if values.dtype == np.uint8 else None
        writer.add_tensor(name, values, raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def model_tensors(
    architecture: str = "llama", *, num_layers: int = 2, tied: bool = False
) -> dict[str, np.ndarray]:
    """Random F32 tensors by GGUF name for `write_model`: head size 4, vocabulary 4."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (4, 8), "output_norm.weight": (8,)}
    if not tied:
        shapes["output.weight"] = (4, 8)
    for layer in range(num_layers):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in _LAYER_SHAPES.items()}
        if architecture == "qwen2":
            shapes |= {f"blk.{layer}.attn_{x}.bias": ({"q": 8}.get(x, 4),) for x in "qkv"}
        if architecture == "qwen3":
            shapes |= {f"blk.{layer}.attn_{x}_norm.weight": (4,) for x in "qk"}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


_LAYER_SHAPES = {
    "attn_norm.weight": (8,), "attn_q.weight": (8, 8), "attn_k.weight": (4, 8),
    "attn_v.weight": (4, 8), "attn_output.weight": (8, 8), "ffn_norm.weight": (8,),
    "ffn_gate.weight": (12, 8), "ffn_up.weight": (12, 8), "ffn_down.weight": (8, 12),
}  # fmt: skip
