"""Whether a written merge is what was computed: SHA-256 of tensors on their way, and of the files.

Merging a second time to compare would not do: a product of other slices may round differently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from chatserve.errors import ModelLoadError
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.manifest import parts, raw
from chatserve.models.weights import TensorInfo, WeightSource
from chatserve.progress import Progress

if TYPE_CHECKING:
    from hashlib import _Hash


class HashedWeights:
    """A `WeightSource` that gives tensors as they will be written and hashes what it gives.

    It is read once, each tensor's rows in their order.
    """

    def __init__(self, weights: WeightSource, dtypes: Mapping[str, torch.dtype]) -> None:
        self._weights, self._dtypes = weights, dtypes
        self._hashes: dict[str, _Hash] = {}

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._weights.tensors()

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        tensor = self._weights.read(name, rows).to(self._dtypes[name])
        self._hashes.setdefault(name, hashlib.sha256()).update(raw(tensor))
        return tensor

    def close(self) -> None:
        self._weights.close()

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every tensor that was read."""
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}


def verify_hashes(target: Path, hashes: Mapping[str, str], progress: Progress) -> None:
    """Read the model in `target` and compare. Raises `ModelLoadError` naming a tensor."""
    with closing(open_checkpoint(target).weights) as weights:
        infos = weights.tensors()
        for name in sorted(infos.keys() ^ hashes.keys()):
            where = "what was merged" if name in infos else "the files"
            raise ModelLoadError(f"{target}: {name!r} is missing in {where}")
        done, total = 0, sum(info.num_bytes for info in infos.values())
        for name, info in infos.items():
            digest = hashlib.sha256()
            for rows in parts(info) if info.shape else (None,):
                digest.update(raw(weights.read(name, rows)))
            if digest.hexdigest() != hashes[name]:
                raise ModelLoadError(f"{target}: {name!r} is not what was merged into it")
            done += info.num_bytes
            progress(done, total)
