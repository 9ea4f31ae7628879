"""GGUFFile: a reader for one GGUF file, safe on hostile ones. Raw names; knows no architecture.

Version 2 and 3, little-endian. Every count, length, offset and size is a Python int that is checked
against the size of the file before anything is allocated. Only the header and one tensor at a time
are read; nothing is mapped. Source: docs/gguf.md of ggml.
"""

from __future__ import annotations

import math
import reprlib
import stat
import struct
import threading
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from chatserve.errors import ModelLoadError
from chatserve.models.gguf_quants import TENSOR_TYPES, Dequantize, TensorType, type_name
from chatserve.models.weights import TensorInfo

MAX_KEYS = 64 * 1024
MAX_TENSORS = 64 * 1024
MAX_DIMS = 4
MAX_NAME_BYTES = 64 * 1024
MAX_HEADER_BYTES = 64 * 1024 * 1024  # the largest vocabularies in use need about 20 MB
MAX_ITEMS = 4 * 1024 * 1024  # of one array
_DEFAULT_ALIGNMENT = 32
_FIRST_READ_BYTES = 1 << 20
_CHUNK_VALUES = 1 << 18  # per step of a dequantisation: its temporaries stay in the CPU's cache

_AGAIN = "download or convert it again"
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


class _Entry(NamedTuple):
    """One tensor of the file: what `read` needs besides its public header."""

    info: TensorInfo
    kind: TensorType
    offset: int  # from the start of the file


class GGUFFile:
    """The metadata and the tensors of one GGUF file.

    Shapes are in torch's order (GGUF stores them reversed). `metadata` holds ints, floats, bools,
    strings and lists of one of these. Reading from several threads is allowed.
    """

    def __init__(
        self, path: Path, file: FileIO, metadata: dict[str, Any], entries: list[_Entry]
    ) -> None:
        self.path = path
        self.metadata = metadata
        self._file = file
        self._lock = threading.Lock()
        self._entries = {entry.info.name: entry for entry in entries}

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Read and check the header.

        Raises `ModelLoadError` with the file, what is wrong, at which byte, and the way out.
        """
        file, size = _open(path)
        try:
            metadata, entries = _read_header(_Cursor(path, file, size))
        except BaseException:
            file.close()
            raise
        return cls(path, file, metadata, entries)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Headers by GGUF name, in disk order."""
        return {name: entry.info for name, entry in self._entries.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU: F32, F16 and BF16 as stored, quantised types as float32.

        Raises `ModelLoadError` when the file cannot be read or ends before the tensor does.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise ModelLoadError(f"{self.path} has no tensor {quote(name)}; {_AGAIN}")
        tensor = torch.empty(entry.info.shape, dtype=entry.info.dtype)
        if entry.kind.dequantize is None:
            self._read_into(tensor.reshape(-1).view(torch.uint8).numpy().data, entry, 0)
        else:
            self._dequantize_into(tensor, entry, entry.kind.dequantize)
        return tensor

    def close(self) -> None:
        """Close the file; reading afterwards raises `ModelLoadError`."""
        self._file.close()

    def _dequantize_into(self, tensor: torch.Tensor, entry: _Entry, dequantize: Dequantize) -> None:
        kind = entry.kind
        out = tensor.numpy().reshape(-1, kind.block_size)
        step = _CHUNK_VALUES // kind.block_size
        raw = np.empty((min(step, len(out)), kind.block_bytes), np.uint8)
        with np.errstate(all="ignore"):  # scales that are NaN or infinite stay what they are
            for start in range(0, len(out), step):
                blocks = raw[: len(out) - start]
                self._read_into(blocks.data, entry, start * kind.block_bytes)
                dequantize(blocks, out[start : start + step])

    def _read_into(self, buffer: memoryview, entry: _Entry, skip: int) -> None:
        """Fill `buffer` from the tensor's bytes, `skip` bytes behind its start."""
        view = buffer.cast("B")
        try:
            with self._lock:
                self._file.seek(entry.offset + skip)
                while view and (got := self._file.readinto(view)):
                    view = view[got:]
        except (OSError, ValueError) as error:  # ValueError: the file has been closed
            raise ModelLoadError(
                f"{self.path}: cannot read tensor {quote(entry.info.name)}: {error}"
            ) from error
        if view:
            raise ModelLoadError(
                f"{self.path} ends within tensor {quote(entry.info.name)}: it was cut while in use; "
                f"{_AGAIN}"
            )


def _open(path: Path) -> tuple[FileIO, int]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelLoadError(f"{path} is not a file; give the path of a .gguf file")
        return FileIO(path, "r"), status.st_size
    except OSError as error:
        raise ModelLoadError(
            f"cannot open {path}: {error.strerror or error}; check the path"
        ) from error
    except ValueError as error:  # a NUL byte in the path
        raise ModelLoadError(f"cannot open {path!r}: {error}; check the path") from error


class _Cursor:
    """Moves through the header, loading the file's first bytes as far as they are needed."""

    def __init__(self, path: Path, file: FileIO, size: int) -> None:
        self.path = path
        self.size = size
        self.position = 0
        self._file = file
        self._data = b""

    def fail(self, what: str, way_out: str = _AGAIN) -> NoReturn:
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


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], list[_Entry]]:
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
    return metadata, _read_tensor_headers(cursor, num_tensors, alignment)


def _check_version(cursor: _Cursor) -> None:
    if cursor.size < 4 or (magic := cursor.raw(4)) != b"GGUF":
        found = "too short" if cursor.size < 4 else f"starts with {magic!r}, not with b'GGUF'"
        cursor.fail(f"this is no GGUF file: it is {found}", "check the path or download it again")
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
    if count > MAX_ITEMS:
        cursor.fail(f"{quote(key)} is an array of {count:,} items, allowed are {MAX_ITEMS:,}")
    if layout := _SCALARS.get(kind):
        return cursor.numbers(count, layout)
    if kind == _STRING:
        return cursor.strings(count, quote(key))
    if kind == _ARRAY:
        cursor.fail(f"{quote(key)} is an array of arrays, which is not supported")
    cursor.fail(f"{quote(key)} is an array of unknown value type {kind}")


def _read_tensor_headers(cursor: _Cursor, num_tensors: int, alignment: int) -> list[_Entry]:
    entries: dict[str, _Entry] = {}
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


def _read_tensor_header(cursor: _Cursor, alignment: int) -> _Entry:
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
            f"the file has {cursor.size:,}"
        )
    offset = cursor.u64()
    if offset % alignment:
        cursor.fail(f"tensor {quote(name)}: offset {offset:,} is not a multiple of {alignment}")
    return _Entry(TensorInfo(name, shape, kind.dtype, num_bytes), kind, offset)


def _check_places(cursor: _Cursor, placed: list[_Entry]) -> None:
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
