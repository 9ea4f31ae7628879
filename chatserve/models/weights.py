"""What a checkpoint looks like to the loader: names, headers, one tensor at a time.

Knows no file format and no family; safetensors, `.bin` and GGUF readers implement `WeightSource`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch


class TensorInfo(NamedTuple):
    """One tensor's header; `dtype` is what `read` returns, `num_bytes` its size on disk."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int


class WeightSource(Protocol):
    """The weights of one checkpoint under Hugging Face names."""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Headers of all tensors, in disk order; reads no weights."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, contiguous; only this tensor becomes resident."""

    def close(self) -> None:
        """Close the files; reading afterwards is an error."""
