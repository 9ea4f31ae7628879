"""What a checkpoint looks like to the loader: names, headers, a tensor or some rows at a time.

Knows no file format and no family; safetensors, `.bin` and GGUF readers implement `WeightSource`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch

from chatserve.models.packing import Packing


class TensorInfo(NamedTuple):
    """One tensor's header; `dtype` is what `read` returns, `num_bytes` its size on disk.

    `packing`: the form that holds these values exactly, where the file has packed them so.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int
    packing: Packing | None = None


class WeightSource(Protocol):
    """The weights of one checkpoint under Hugging Face names."""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Headers of all tensors, in disk order; reads no weights."""

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """The tensor on the CPU, contiguous; only what is returned becomes resident.

        `rows`: neighbours, read alone. Of a vector that GGUF holds quantised: whole blocks.
        """

    def close(self) -> None:
        """Close the files; reading afterwards is an error."""


def file_packing(tensors: Mapping[str, TensorInfo]) -> Packing | None:
    """The form in which a file has packed all matrices of its blocks, None without a common one."""
    forms = {
        info.packing
        for name, info in tensors.items()
        if name.startswith("model.layers.") and len(info.shape) == 2
    }
    return forms.pop() if len(forms) == 1 else None
