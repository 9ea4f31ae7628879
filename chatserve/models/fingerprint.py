"""A short name for the content of a checkpoint, from its headers and smallest tensors."""

from __future__ import annotations

import hashlib
import json

import torch

from chatserve.models.checkpoint import Checkpoint

_NUM_VECTORS = 8  # at either end


def weights_fingerprint(checkpoint: Checkpoint) -> str:
    """The same for the same weights, whatever folder they lie in.

    Covers config, tensor names, shapes and dtypes, and the content of the smallest tensors. Not
    every weight, which would cost a full read: weights that differ in their large matrices alone
    look alike. Raises `ModelLoadError` when they cannot be read.
    """
    digest = hashlib.sha256()
    infos = checkpoint.weights.tensors()
    digest.update(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    for info in infos.values():
        digest.update(f"{info.name} {info.shape} {info.dtype}\n".encode())
    vectors = [name for name, info in infos.items() if len(info.shape) == 1]
    for name in dict.fromkeys(vectors[:_NUM_VECTORS] + vectors[-_NUM_VECTORS:]):
        digest.update(checkpoint.weights.read(name).view(torch.uint8).numpy().tobytes())
    return f"w_{digest.hexdigest()[:16]}"
