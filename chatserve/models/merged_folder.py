"""A merged checkpoint as a model folder of its own: `save_merged`. Tensor by tensor, rows by rows.

Knows the files of a Hugging Face folder; what is merged, and how a folder is written so that it is
never half there, is decided elsewhere.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from chatserve.models.checkpoint import Checkpoint
from chatserve.models.manifest import dtype_name
from chatserve.models.safetensors_writer import FolderWriter
from chatserve.models.weight_files import member
from chatserve.models.weights import TensorInfo
from chatserve.progress import Progress

COMPANIONS = (
    "generation_config.json", "tokenizer.*", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.*", "LICENSE*", "NOTICE*",
    "USE_POLICY*",
)  # fmt: skip
"""What goes along with the weights, by name; everything else in a folder stays where it is."""

NOTHING_CHANGED: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
_SLICE_VALUES = 1 << 22  # read, merged and written at a time
_TABLES = re.compile(r".*rotary_emb\.inv_freq")  # every network computes them itself


def save_merged(
    merged: Checkpoint,
    base: Checkpoint,
    target: Path,
    *,
    dtype: torch.dtype | None,
    force: bool,
    sources: Sequence[Path],
    progress: Progress,
    changed: Mapping[str, Mapping[str, Any]] = NOTHING_CHANGED,
) -> None:
    """Write `merged` to the folder `target`, with the tokenizer of `base`, which it is made of.

    dtype: of all floating-point tensors; None for what each has in `base`. `sources` are not
    overwritten. changed: JSON files of the base that become others, or are new. Raises
    `ModelLoadError`, and `UsageError` and `CannotWrite` for the target.
    """
    infos = [
        _written(info, dtype)
        for name, info in base.weights.tensors().items()
        if not _TABLES.fullmatch(name)
    ]
    with FolderWriter(
        target, infos, metadata={"format": "pt"}, force=force, sources=sources
    ) as writer:
        for name in sorted(os.listdir(base.path)):
            is_companion = any(fnmatchcase(name, pattern) for pattern in COMPANIONS)
            if is_companion and name not in changed:
                writer.copy_file(member(base.path, name))
        for name, content in changed.items():
            writer.write_json(name, content)
        writer.write_json("config.json", _config(merged.config, dtype))
        done = 0
        progress(0, writer.num_bytes)
        for info in infos:
            writer.write(info.name, _parts(merged, info))
            done += math.prod(info.shape) * info.dtype.itemsize
            progress(done, writer.num_bytes)
        writer.finish()


def _written(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return (
        info._replace(dtype_name=dtype_name(dtype))
        if dtype and info.dtype.is_floating_point
        else info
    )


def _parts(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[torch.Tensor]:
    """A tensor's rows in the dtype that is written, some at a time."""
    if not info.shape:
        yield checkpoint.weights.read(info.name).to(info.dtype)
        return
    step = max(1, _SLICE_VALUES // max(1, math.prod(info.shape[1:])))
    for start in range(0, info.shape[0], step):
        rows = range(start, min(start + step, info.shape[0]))
        yield checkpoint.weights.read(info.name, rows).to(info.dtype)


def _config(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    if dtype is None:
        return config
    key = "dtype" if "dtype" in config else "torch_dtype"
    return {**config, key: dtype_name(dtype)}
