"""What a checkpoint looks like to the loader: names, headers, a tensor or some rows at a time.

Knows no file format and no family; safetensors, `.bin` and GGUF readers implement `WeightSource`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from chatserve.models.packing import Packing

if TYPE_CHECKING:
    import torch

ITEM_BYTES: Mapping[str, int] = {
    "bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2,
    "int32": 4, "uint32": 4, "float32": 4,
    "int64": 8, "uint64": 8, "float64": 8, "complex64": 8,
}  # fmt: skip
"""Bytes of one value of each dtype that a file may hold, by PyTorch's name of it."""


class TensorInfo(NamedTuple):
    """One tensor's header; `dtype_name` is what `read` returns, `num_bytes` its size on disk.

    `packing`: the form that holds these values exactly, where the file has packed them so.
    Headers are read without PyTorch, whose import takes longer than they do.
    """

    name: str
    shape: tuple[int, ...]
    dtype_name: str
    num_bytes: int
    packing: Packing | None = None

    @property
    def is_real(self) -> bool:
        """Whether these are floating-point numbers."""
        return "float" in self.dtype_name

    @property
    def dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype


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


@runtime_checkable
class DirectSource(WeightSource, Protocol):
    """Weights whose bytes are in the file as they are in memory."""

    def read_into(self, name: str, rows: range, out: torch.Tensor) -> None:
        """Rows of a tensor into memory of the same dtype and shape: contiguous, on the CPU."""


def file_packing(tensors: Mapping[str, TensorInfo]) -> Packing | None:
    """The form in which a file has packed all matrices of its blocks, None without a common one."""
    forms = {
        info.packing
        for name, info in tensors.items()
        if name.startswith("model.layers.") and len(info.shape) == 2
    }
    return forms.pop() if len(forms) == 1 else None
