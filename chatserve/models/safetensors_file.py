"""Reader of one `.safetensors` file: strict header checks at opening, one tensor at a time after.

Layout: 8-byte little-endian header length, JSON header `{name: {dtype, shape, data_offsets}}`, raw
little-endian data without gaps. Knows nothing of shards, indexes or model families.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from chatserve.errors import ModelLoadError
from chatserve.models.weight_file import WeightFile
from chatserve.models.weights import ITEM_BYTES, TensorInfo

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 100_000
MAX_DIMS = 8
MAX_VALUES = MAX_TENSORS * (MAX_DIMS + 6)
MAX_WIDE_BYTES = 16 << 20
"""Of a header with characters that a Python string may keep in four bytes each."""
MAX_NAME_CHARS = 1024
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}


class _Extent(NamedTuple):
    """A tensor's bytes, relative to the start of the data."""

    begin: int
    end: int
    info: TensorInfo


class SafetensorsFile:
    """The tensors of one file; a `WeightSource`."""

    def __init__(self, path: Path) -> None:
        """Raises `ModelLoadError` when the header does not describe the file exactly."""
        self._file = WeightFile(path)
        try:
            header, self._data_offset = self._read_header()
            extents = sorted(
                self._extent(name, entry)
                for name, entry in header.items()
                if name != "__metadata__"
            )
            self._check_layout(extents)
        except ModelLoadError:
            self.close()
            raise
        self._begins = {extent.info.name: extent.begin for extent in extents}
        self._tensors = {extent.info.name: extent.info for extent in extents}

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        info = self._tensors[name]
        return self._file.read_tensor(
            self._data_offset + self._begins[name], info.shape, info.dtype_name, rows
        )

    def read_into(self, name: str, rows: range, out: torch.Tensor) -> None:
        info = self._tensors[name]
        begin = self._data_offset + self._begins[name]
        self._file.read_into(begin + rows.start * (info.num_bytes // info.shape[0]), out)

    def close(self) -> None:
        self._file.close()

    def _read_header(self) -> tuple[dict[str, Any], int]:
        num_bytes = int.from_bytes(self._file.read(0, 8), "little")
        if num_bytes > MAX_HEADER_BYTES:
            raise self._bad(f"its header claims {num_bytes} bytes, over {MAX_HEADER_BYTES}")
        raw = self._file.read(8, num_bytes)
        if not raw.startswith(b"{"):
            raise self._bad("its header is not a JSON object")
        # Counted before parsing: the values of a 100 MB header would take gigabytes.
        num_entries = raw.count(b"{") - 1
        if num_entries > MAX_TENSORS + 1:
            raise self._bad(f"it lists {num_entries} tensors, over {MAX_TENSORS}")
        num_values = raw.count(b",") + raw.count(b"[")
        if num_values > MAX_VALUES:
            raise self._bad(f"its header has {num_values} values, over {MAX_VALUES}")
        if len(raw) > MAX_WIDE_BYTES and not raw.isascii():
            raise self._bad(f"its header has over {MAX_WIDE_BYTES} bytes that are not all ASCII")
        try:
            text = raw.decode("utf-8")
            del raw  # not kept beside it
            header = json.loads(text, object_pairs_hook=_unique_names)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"its header is not valid ({error})") from error
        if len(header) > MAX_TENSORS:
            raise self._bad(f"it lists {len(header)} tensors, over {MAX_TENSORS}")
        return header, 8 + num_bytes

    def _extent(self, name: str, entry: Any) -> _Extent:
        if len(name) > MAX_NAME_CHARS:
            raise self._bad(f"a tensor's name has {len(name)} characters, over {MAX_NAME_CHARS}")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"{name!r} is not described by dtype, shape and data_offsets")
        shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._bad(f"{name!r} has the dtype {dtype!r}, which chatserve does not read")
        if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
            raise self._bad(f"{name!r} has an impossible shape or place")
        num_bytes = math.prod(shape) * ITEM_BYTES[DTYPES[dtype]]
        begin, end = offsets
        if end - begin != num_bytes:
            raise self._bad(f"{name!r} takes {num_bytes} bytes, its place has {end - begin}")
        return _Extent(begin, end, TensorInfo(name, tuple(shape), DTYPES[dtype], num_bytes))

    def _check_layout(self, extents: list[_Extent]) -> None:
        """The tensors fill the data without gap or overlap, to the file's last byte."""
        end = 0
        for extent in extents:
            if extent.begin != end:
                raise self._bad(f"{extent.info.name!r} overlaps its neighbour or leaves a gap")
            end = extent.end
        num_bytes = self._data_offset + end
        if num_bytes > self._file.size:
            raise self._bad(f"truncated: {self._file.size} of {num_bytes} bytes are there")
        if num_bytes < self._file.size:
            raise self._bad(f"{self._file.size - num_bytes} bytes follow the last tensor")

    def _bad(self, reason: str) -> ModelLoadError:
        return ModelLoadError(f"{self._file.path}: {reason}; download the file again")


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _are_counts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMS
        and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )
