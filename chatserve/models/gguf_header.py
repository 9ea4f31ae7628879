"""The header of a GGUF file: metadata and where each tensor lies, checked as it is read.

Reads no tensor and knows no architecture. Nothing in the file is trusted: every count, length,
offset and size is a Python int that is compared with the size of the file before memory is spent.
Source: docs/gguf.md of ggml.
"""

from __future__ import annotations

import math
import reprlib
import struct
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from chatserve.errors import ModelLoadError
from chatserve.models.gguf_quants import TENSOR_TYPES, TensorType, type_name
from chatserve.models.weights import TensorInfo

MAX_KEYS = 64 * 1024
MAX_TENSORS = 64 * 1024
MAX_DIMS = 4
MAX_NAME_BYTES = 64 * 1024
MAX_HEADER_BYTES = 64 * 1024 * 1024  # the largest vocabularies in use need about 20 MB
MAX_ITEMS = 4 * 1024 * 1024  # of all arrays together: two bytes there may be forty in memory
MAX_STRINGS = 768 * 1024  # of those: one may take eighty bytes; large vocabularies have 650,000
_DEFAULT_ALIGNMENT = 32
_FIRST_READ_BYTES = 1 << 20

AGAIN = "download or convert it again"
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"), 3: struct.Struct("<h"),
    4: struct.Struct("<I"), 5: struct.Struct("<i"), 6: struct.Struct("<f"), 7: struct.Struct("<?"),
    10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d"),
}  # fmt: skip
_UINT32 = 4

_shortened = reprlib.Repr()
_shortened.maxstring = 100


def quote(value: object) -> str:
    """A value from a file as messages show it: escaped, and shortened where it is long."""
    return _shortened.repr(value)


class Entry(NamedTuple):
    """One tensor of the file: what `read` needs besides its public header."""

    info: TensorInfo
    kind: TensorType
    offset: int  # from the start of the file


class Header(NamedTuple):
    """What stands in front of the tensors; `entries` in disk order."""

    metadata: dict[str, Any]
    entries: list[Entry]


def read_header(path: Path, file: FileIO, size: int) -> Header:
    """Read and check the header of `file`, which has `size` bytes.

    Raises `ModelLoadError` with the file, what is wrong, at which byte, and the way out.
    """
    cursor = _Cursor(path, file, size)
    _check_version(cursor)
    num_tensors, num_keys = cursor.u64(), cursor.u64()
    if num_tensors > MAX_TENSORS:
        cursor.fail(f"the header counts {num_tensors:,} tensors, allowed are {MAX_TENSORS:,}")
    if num_keys > MAX_KEYS:
        cursor.fail(f"the header counts {num_keys:,} metadata keys, allowed are {MAX_KEYS:,}")
    metadata: dict[str, Any] = {}
    alignment = _DEFAULT_ALIGNMENT
    for _ in range(num_keys):
        key = cursor.name("a metadata key")
        if key in metadata:
            cursor.fail(f"metadata key {quote(key)} appears twice")
        kind = cursor.u32()
        metadata[key] = _read_value(cursor, key, kind)
        if key == "general.alignment":
            alignment = _check_alignment(cursor, kind, metadata[key])
    return Header(metadata, _read_tensor_headers(cursor, num_tensors, alignment))


class _Cursor:
    """Moves through the header, loading the file's first bytes as far as they are needed."""

    def __init__(self, path: Path, file: FileIO, size: int) -> None:
        self.path = path
        self.size = size
        self.position = 0
        self.num_items = 0  # of the arrays so far
        self.num_strings = 0
        self._file = file
        self._data = b""

    def fail(self, what: str, way_out: str = AGAIN) -> NoReturn:
        """Raise `ModelLoadError` with the file and the byte."""
        raise ModelLoadError(f"{self.path}: {what} (at byte {self.position:,}); {way_out}")

    def number(self, layout: struct.Struct) -> Any:
        """One scalar."""
        end = self.position + layout.size
        if end > len(self._data):
            self._load(end)
        (value,) = layout.unpack_from(self._data, self.position)
        self.position = end
        return value

    def u32(self) -> int:
        """An unsigned 32-bit number."""
        return int(self.number(_SCALARS[4]))

    def u64(self) -> int:
        """An unsigned 64-bit number."""
        return int(self.number(_SCALARS[10]))

    def raw(self, num_bytes: int) -> bytes:
        """The next bytes."""
        end = self.position + num_bytes
        if end > len(self._data):
            self._load(end)
        data = self._data[self.position : end]
        self.position = end
        return data

    def string(self, what: str) -> str:
        """One string behind its length."""
        data = self.raw(self.u64())
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def name(self, what: str) -> str:
        """A key or a tensor's name: a string of a reasonable length."""
        start = self.position
        length = self.u64()
        if not 0 < length <= MAX_NAME_BYTES:
            self.fail(f"{what} has {length:,} bytes, allowed are 1 to {MAX_NAME_BYTES:,}")
        self.position = start
        return self.string(what)

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings; vocabularies have 100,000s, hence the flat loop."""
        self._check(8 * count)
        found: list[str] = []
        append = found.append
        data, position, loaded = self._data, self.position, len(self._data)
        unpack = _SCALARS[10].unpack_from
        try:
            for _ in range(count):
                start = position + 8
                if start > loaded:
                    data = self._load(start)
                    loaded = len(data)
                position = start + unpack(data, position)[0]
                if position > loaded:
                    data = self._load(position)
                    loaded = len(data)
                append(data[start:position].decode())
        except UnicodeDecodeError:
            self.fail(f"string {len(found):,} of {what} is not UTF-8")
        self.position = position
        return found

    def numbers(self, count: int, layout: struct.Struct) -> list[Any]:
        """`count` scalars of one type."""
        data = self.raw(layout.size * count)
        values: list[Any] = np.frombuffer(data, layout.format).tolist()
        return values

    def _check(self, num_bytes: int) -> None:
        """Refuse bytes that the file does not have, before memory is spent on them."""
        if self.position + num_bytes > self.size:
            self.fail(
                f"the header asks for {num_bytes:,} bytes, the file ends after {self.size:,}: "
                "it is cut off or damaged"
            )
        if self.position + num_bytes > MAX_HEADER_BYTES:
            self.fail(f"the header is larger than {MAX_HEADER_BYTES:,} bytes")

    def _load(self, end: int) -> bytes:
        """Have the first `end` bytes of the file, and some to spare, in memory."""
        self._check(end - self.position)
        wanted = min(max(end, _FIRST_READ_BYTES, 2 * len(self._data)), self.size)
        pieces = [self._data]
        missing = wanted - len(self._data)
        try:
            while missing and (piece := self._file.read(missing)):
                pieces.append(piece)
                missing -= len(piece)
        except OSError as error:
            raise ModelLoadError(f"cannot read {self.path}: {error}; check the disk") from error
        self._data = b"".join(pieces)
        if len(self._data) < end:
            self.fail("the file became shorter while it was read")
        return self._data


def _check_version(cursor: _Cursor) -> None:
    if cursor.size < 4 or (magic := cursor.raw(4)) != b"GGUF":
        found = "is too short" if cursor.size < 4 else f"starts with {magic!r}, not b'GGUF'"
        cursor.fail(f"this is no GGUF file: it {found}", "check the path or download it again")
    version = cursor.u32()
    if version in (2, 3):
        return
    if version & 0xFFFF == 0 and version:
        cursor.fail("this GGUF file is big-endian", "convert it with --endian little")
    cursor.fail(
        f"GGUF version {version} is unknown, supported are 2 and 3", "convert the model again"
    )


def _check_alignment(cursor: _Cursor, kind: int, value: Any) -> int:
    if kind != _UINT32:
        cursor.fail(f"general.alignment has value type {kind}, expected is {_UINT32} (uint32)")
    alignment = int(value)
    if alignment < 8 or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {alignment}, not a power of two from 8")
    return alignment


def _read_value(cursor: _Cursor, key: str, kind: int) -> Any:
    if layout := _SCALARS.get(kind):
        return cursor.number(layout)
    if kind == _STRING:
        return cursor.string(f"the value of {quote(key)}")
    if kind == _ARRAY:
        return _read_array(cursor, key)
    cursor.fail(f"{quote(key)} has unknown value type {kind}")


def _read_array(cursor: _Cursor, key: str) -> list[Any]:
    kind, count = cursor.u32(), cursor.u64()
    cursor.num_items += count
    if cursor.num_items > MAX_ITEMS:
        cursor.fail(
            f"{quote(key)} is an array of {count:,} items, allowed are {MAX_ITEMS:,} in all arrays"
        )
    if layout := _SCALARS.get(kind):
        return cursor.numbers(count, layout)
    if kind == _STRING:
        cursor.num_strings += count
        if cursor.num_strings > MAX_STRINGS:
            cursor.fail(
                f"{quote(key)} is an array of {count:,} strings, allowed are {MAX_STRINGS:,} in "
                "all arrays"
            )
        return cursor.strings(count, quote(key))
    if kind == _ARRAY:
        cursor.fail(f"{quote(key)} is an array of arrays, which is not supported")
    cursor.fail(f"{quote(key)} is an array of unknown value type {kind}")


def _read_tensor_headers(cursor: _Cursor, num_tensors: int, alignment: int) -> list[Entry]:
    entries: dict[str, Entry] = {}
    for _ in range(num_tensors):
        entry = _read_tensor_header(cursor, alignment)
        if entry.info.name in entries:
            cursor.fail(f"tensor name {quote(entry.info.name)} appears twice")
        entries[entry.info.name] = entry
    data_start = -(-cursor.position // alignment) * alignment
    placed = sorted(
        (entry._replace(offset=data_start + entry.offset) for entry in entries.values()),
        key=lambda entry: entry.offset,
    )
    _check_places(cursor, placed)
    return placed


def _read_tensor_header(cursor: _Cursor, alignment: int) -> Entry:
    """One header; the offset is still relative to the start of the data."""
    name = cursor.name("a tensor's name")
    num_dims = cursor.u32()
    if not 1 <= num_dims <= MAX_DIMS:
        cursor.fail(f"tensor {quote(name)} has {num_dims} dimensions, allowed are 1 to {MAX_DIMS}")
    shape = tuple(cursor.u64() for _ in range(num_dims))[::-1]
    if 0 in shape:
        cursor.fail(f"tensor {quote(name)} has an empty dimension: {shape}")
    number = cursor.u32()
    kind = TENSOR_TYPES.get(number)
    if kind is None:
        supported = ", ".join(known.name for known in TENSOR_TYPES.values())
        cursor.fail(
            f"tensor {quote(name)} has type {type_name(number)}, supported are {supported}",
            "take another quantisation of the model",
        )
    if shape[-1] % kind.block_size:
        cursor.fail(
            f"tensor {quote(name)}: rows of {shape[-1]:,} values do not divide into blocks of "
            f"{kind.block_size} ({kind.name})"
        )
    num_bytes = math.prod(shape) // kind.block_size * kind.block_bytes
    if num_bytes > cursor.size:
        cursor.fail(
            f"tensor {quote(name)} of shape {shape} takes {num_bytes:,} bytes, "
            f"the file has {cursor.size:,}: it is cut off or damaged"
        )
    offset = cursor.u64()
    if offset % alignment:
        cursor.fail(f"tensor {quote(name)}: offset {offset:,} is not a multiple of {alignment}")
    return Entry(TensorInfo(name, shape, kind.dtype, num_bytes, kind.packing), kind, offset)


def _check_places(cursor: _Cursor, placed: list[Entry]) -> None:
    """Tensors in disk order lie inside the file and do not overlap."""
    end, before = 0, ""
    for info, _, offset in placed:
        if offset < end:
            cursor.fail(f"tensors {quote(before)} and {quote(info.name)} overlap")
        end, before = offset + info.num_bytes, info.name
        if end > cursor.size:
            cursor.fail(
                f"tensor {quote(info.name)} ends at byte {end:,}, the file after {cursor.size:,}: "
                "it is cut off or damaged"
            )
