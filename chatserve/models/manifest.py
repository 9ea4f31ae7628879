"""The record of a model that was made from others: a SHA-256 for every tensor, and of what it came.

Lies beside the weights. Knows readers only by their protocol, and no arithmetic on weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chatserve.errors import ModelLoadError
from chatserve.models.weight_files import read_json
from chatserve.models.weights import TensorInfo, WeightSource
from chatserve.progress import Progress

MANIFEST_NAME = "chatserve-manifest.json"
# Below the size from which `WeightFile` maps fresh pages for each part: those cost more than
# everything else that is done with the part.
MAX_PART_BYTES = (1 << 20) - 1
_SAMPLE_BYTES = 16 << 10
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the made model; `base` and `delta` are hashes of samples, see `sample`."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    base: str
    delta: str


@dataclass(frozen=True)
class Manifest:
    """`base` and `delta` are the names of the folders that were read."""

    base: str
    delta: str
    tensors: Mapping[str, TensorRecord]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_manifest(path: Path) -> Manifest:
    """From a file, or from the model folder it lies in. Raises `ModelLoadError`."""
    folder, name = (path, MANIFEST_NAME) if path.is_dir() else (path.parent, path.name)
    content = read_json(folder, name)
    try:
        tensors = {
            tensor: TensorRecord(**{**entry, "shape": tuple(entry["shape"])})
            for tensor, entry in content["tensors"].items()
        }
        hashes = [
            value
            for record in tensors.values()
            for value in (record.sha256, record.base, record.delta)
        ]
        if not tensors or not all(map(_SHA256.fullmatch, hashes)):
            raise ValueError("no SHA-256 for every tensor")
        return Manifest(str(content["base"]), str(content["delta"]), tensors)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(
            f"{folder / name}: is not a manifest of chatserve apply-delta ({error!r}); take the "
            f"{MANIFEST_NAME} of a model that it made"
        ) from error


def verify(
    folder: Path, weights: WeightSource, manifest: Manifest, progress: Progress | None = None
) -> None:
    """Read all weights of `folder` and compare them. Raises `ModelLoadError` naming a tensor."""
    infos = weights.tensors()
    for name in sorted(infos.keys() ^ manifest.tensors.keys()):
        where = "the manifest" if name in infos else "the weights"
        raise ModelLoadError(f"{folder}: {name!r} is missing in {where}; make the model again")
    total = sum(info.num_bytes for info in infos.values())
    done = 0
    for name, info in infos.items():
        digest = hashlib.sha256()
        for rows in parts(info):
            digest.update(raw(weights.read(name, rows)))
        compare(folder, info, digest.hexdigest(), manifest)
        done += info.num_bytes
        if progress is not None:
            progress(done, total)


def compare(folder: Path, info: TensorInfo, sha256: str, manifest: Manifest) -> None:
    """Raises `ModelLoadError` when the tensor of `folder` is not the recorded one."""
    record = manifest.tensors.get(info.name)
    if record is None:
        raise ModelLoadError(f"{folder}: the manifest has no {info.name!r}; it is of another model")
    if (record.shape, record.dtype) != (info.shape, dtype_name(info.dtype)):
        raise ModelLoadError(
            f"{folder}: {info.name!r} is {dtype_name(info.dtype)} {info.shape}, the manifest says "
            f"{record.dtype} {record.shape}"
        )
    if record.sha256 != sha256:
        raise ModelLoadError(
            f"{folder}: {info.name!r} has the SHA-256 {sha256}, the manifest says {record.sha256}; "
            "base, delta or this folder are not what the manifest was made of"
        )


def parts(info: TensorInfo, row_bytes: int = 0) -> Iterator[range]:
    """Neighbouring rows of a tensor, a small piece at a time; (0 dimensions: one row).

    `row_bytes`: of a row where it is larger than this tensor's own.
    """
    num_rows = info.shape[0] if info.shape else 1
    row_bytes = max(row_bytes, math.prod(info.shape[1:]) * info.dtype.itemsize, 1)
    step = max(1, MAX_PART_BYTES // row_bytes)
    for start in range(0, num_rows, step):
        yield range(start, min(start + step, num_rows))


def sample(weights: WeightSource, info: TensorInfo) -> str:
    """SHA-256 of a tensor's shape and first rows in float16: the same whatever file they are in."""
    row_bytes = max(math.prod(info.shape[1:]) * info.dtype.itemsize, 1)
    num_rows = min(info.shape[0], max(1, _SAMPLE_BYTES // row_bytes))
    rows = weights.read(info.name, range(num_rows)).to(torch.float16)
    return hashlib.sha256(repr(info.shape).encode() + raw(rows)).hexdigest()


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
