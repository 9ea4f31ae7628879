"""A short name for the content of a checkpoint, from its headers and some rows of each tensor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator

import torch

from chatserve.models.checkpoint import Checkpoint
from chatserve.models.weights import TensorInfo

_NUM_VECTORS = 8  # at either end
_NUM_ROWS = 4  # of each matrix
_MAX_ROW_BYTES = 256 << 10  # of larger ones, experts in one tensor, only the first is read


def weights_fingerprint(checkpoint: Checkpoint) -> str:
    """The same for the same weights, whatever folder they lie in.

    Covers config, tensor names, shapes and dtypes, some vectors, and of each matrix a few rows: a
    training changes all of them. Not every weight, which would cost a full read: weights that
    differ in other rows alone look alike. Raises `ModelLoadError` when they cannot be read.
    """
    digest = hashlib.sha256()
    infos = checkpoint.weights.tensors()
    digest.update(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    for info in infos.values():
        digest.update(f"{info.name} {info.shape} {info.dtype}\n".encode())
    vectors = [name for name, info in infos.items() if len(info.shape) == 1]
    for name in dict.fromkeys(vectors[:_NUM_VECTORS] + vectors[-_NUM_VECTORS:]):
        digest.update(_bytes(checkpoint.weights.read(name)))
    for info in infos.values():
        for row in _sampled_rows(info):
            digest.update(_bytes(checkpoint.weights.read(info.name, range(row, row + 1))))
    return f"w_{digest.hexdigest()[:16]}"


def _sampled_rows(info: TensorInfo) -> Iterator[int]:
    """From the first to the last, evenly; none of vectors, numbers and empty tensors."""
    if len(info.shape) < 2 or not math.prod(info.shape):
        return
    last = info.shape[0] - 1
    count = _NUM_ROWS if info.num_bytes // info.shape[0] <= _MAX_ROW_BYTES else 1
    steps = max(1, count - 1)
    yield from sorted({step * last // steps for step in range(count)})


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
