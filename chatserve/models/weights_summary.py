"""What weights on disk are, read from their headers: architecture, dtype, size, fingerprint."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatserve.models.checkpoint import Checkpoint, open_checkpoint
from chatserve.models.fingerprint import weights_fingerprint
from chatserve.models.gguf_parts import open_gguf
from chatserve.models.receipt import Receipt, read_receipt


@dataclass(frozen=True)
class WeightsSummary:
    """`dtypes`: bytes on disk by the name of what they are stored as, most first.

    `receipt`: what `chatserve quality` has measured of these weights, if it has.
    """

    architecture: str
    num_parameters: int
    dtypes: Mapping[str, int]
    fingerprint: str
    receipt: Receipt | None

    @property
    def dtype(self) -> str:
        """What most of the weights are stored as."""
        return next(iter(self.dtypes), "none")


def summarise(path: Path) -> WeightsSummary:
    """Of a folder or `.gguf` file. Raises `ModelLoadError` when it is damaged or no model."""
    checkpoint = open_checkpoint(path)
    with closing(checkpoint.weights):
        infos = checkpoint.weights.tensors().values()
        fingerprint = weights_fingerprint(checkpoint)
        return WeightsSummary(
            architecture=_architecture(checkpoint.config),
            num_parameters=sum(math.prod(info.shape) for info in infos),
            dtypes=_dtypes(checkpoint),
            fingerprint=fingerprint,
            receipt=read_receipt(path, fingerprint),
        )


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        return named[0]
    return str(config.get("model_type", "unknown"))


def _dtypes(checkpoint: Checkpoint) -> dict[str, int]:
    num_bytes: Counter[str] = Counter()
    if checkpoint.metadata is not None:  # a GGUF file has types that torch does not
        with closing(open_gguf(checkpoint.path)) as file:
            names = file.type_names()
            for name, info in file.tensors().items():
                num_bytes[names[name]] += info.num_bytes
    else:
        for info in checkpoint.weights.tensors().values():
            num_bytes[info.dtype_name] += info.num_bytes
    return dict(num_bytes.most_common())
