"""A base and its adapters as one checkpoint: W + scale * B A, added to rows as they are read.

So whatever comes after reading (half precision, 8 bits, a new folder) comes after the merge, and
no second copy of the weights exists. Knows no device and writes nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from chatserve.errors import ModelLoadError
from chatserve.models.adapter import Adapter, LoraPair, load_adapter
from chatserve.models.adapter_config import (
    MERGED_KEY,
    UNPUBLISHED_BASES,
    merged_adapters,
    serve_command,
)
from chatserve.models.checkpoint import Checkpoint
from chatserve.models.config import architectures, is_native
from chatserve.models.form import native_config
from chatserve.models.weights import TensorInfo, WeightSource

logger = logging.getLogger(__name__)


class MergedWeights:
    """A base's weights with adapters added in their order; a `WeightSource` that owns the base's.

    Merged matrices come as float32, so that they are rounded once, whatever the base's dtype is
    and however many adapters there are.
    """

    def __init__(self, base: WeightSource, adapters: Sequence[Adapter]) -> None:
        """Raises `ModelLoadError` for a matrix that is missing, misshapen or not of numbers."""
        self._base = base
        self._pairs: dict[str, list[LoraPair]] = {}
        self._tensors = dict(base.tensors())
        for adapter in adapters:
            for name, pair in adapter.pairs.items():
                self._pairs.setdefault(name, []).append(pair)
                self._tensors[name] = _merged_info(self._tensors.get(name), name, pair, adapter)

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        weight = self._base.read(name, rows)
        if name not in self._pairs:
            return weight
        weight = weight.float()
        for pair in self._pairs[name]:
            b = pair.b if rows is None else pair.b[rows.start : rows.stop]
            weight.addmm_(b, pair.a, alpha=pair.scale)
        return weight

    def close(self) -> None:
        self._base.close()


def merge(checkpoint: Checkpoint, paths: Sequence[Path]) -> Checkpoint:
    """`checkpoint` with the adapters in the folders `paths` added one after the other.

    Without any it is `checkpoint` itself. Raises `ModelLoadError` when one does not fit, or is
    there twice.
    """
    if not paths:
        return checkpoint
    if not is_native(checkpoint.config):
        name = (architectures(checkpoint.config) or ["this model"])[0]
        raise ModelLoadError(
            f"{checkpoint.path}: adapters are added to networks of the Llama family, not to {name};"
            " merge it with peft's merge_and_unload, and serve the result"
        )
    config = native_config(checkpoint)
    merged = merged_adapters(checkpoint.config)
    adapters: list[Adapter] = []
    for path in paths:
        adapter = load_adapter(path, config)
        check_base(adapter, checkpoint, merged)
        merged = [*merged, _record(adapter)]
        adapters.append(adapter)
        logger.info("adapter %s: %d matrices, %s", adapter.name, len(adapter.pairs), path)
    return dataclasses.replace(
        checkpoint,
        config={**checkpoint.config, MERGED_KEY: merged},
        weights=MergedWeights(checkpoint.weights, adapters),
    )


def check_base(
    adapter: Adapter, checkpoint: Checkpoint, merged: Sequence[Mapping[str, Any]]
) -> None:
    """That `adapter` is none of those `merged` into the weights; warns of a base of another name.

    Raises `ModelLoadError`.
    """
    if any(adapter.fingerprint == other.get("fingerprint") for other in merged):
        raise ModelLoadError(
            f"{adapter.path}: this adapter is in the weights already, it must not be added twice; "
            "leave it away"
        )
    _warn_of_other_base(adapter, checkpoint, merged)


def _record(adapter: Adapter) -> dict[str, str | None]:
    return {"name": adapter.name, "base": adapter.base, "fingerprint": adapter.fingerprint}


def _merged_info(
    info: TensorInfo | None, name: str, pair: LoraPair, adapter: Adapter
) -> TensorInfo:
    shape = (pair.b.shape[0], pair.a.shape[1])
    if info is None or info.shape != shape or not info.dtype.is_floating_point:
        found = f"{info.dtype} of shape {info.shape}" if info else "missing"
        raise ModelLoadError(
            f"adapter {adapter.name} changes {name} of shape {shape}, which is {found} in the "
            "base's files; they are damaged or another model's"
        )
    return info._replace(dtype_name="float32", packing=None)


def _warn_of_other_base(
    adapter: Adapter, checkpoint: Checkpoint, merged: Sequence[Mapping[str, Any]]
) -> None:
    """Shapes tell sizes apart, not models: only names can say that the base is another one."""
    if adapter.base is None:
        return
    wanted = adapter.base.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()
    own = checkpoint.config.get("_name_or_path")
    # the whole path: a hub cache has the name two folders above the files
    if wanted in f"{os.path.abspath(checkpoint.path)} {own}".lower():
        return
    if wanted not in UNPUBLISHED_BASES:
        logger.warning(
            "adapter %s was trained on %r, it is added to %s; if that is not the same model, "
            "answers get worse without any other sign",
            adapter.name, adapter.base, checkpoint.path,
        )  # fmt: skip
    elif not merged:
        logger.warning(
            "adapter %s was trained on %r, a base with another adapter in it that %s does not "
            "seem to have; give both: %s",
            adapter.name, adapter.base, checkpoint.path,
            serve_command(adapter.path, adapter.base),
        )  # fmt: skip
