"""GGUFFile: the metadata and the tensors of one GGUF file, safe on hostile ones.

Raw GGUF names; knows no architecture. Version 2 and 3, little-endian. Tensors are read one at a
time, or some rows of one; nothing is mapped.
"""

from __future__ import annotations

import math
import stat
import threading
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chatserve.errors import ModelLoadError
from chatserve.models.gguf_header import AGAIN, Entry, Header, quote, read_header
from chatserve.models.gguf_quants import Dequantize, Floats
from chatserve.models.weight_file import allocate
from chatserve.models.weights import TensorInfo

if TYPE_CHECKING:
    import torch

_CHUNK_VALUES = 1 << 18  # per step of a dequantisation: its temporaries stay in the CPU's cache


class GGUFFile:
    """The metadata and the tensors of one GGUF file.

    Shapes are in torch's order (GGUF stores them reversed). `metadata` holds ints, floats, bools,
    strings and lists of one of these. Reading from several threads is allowed.
    """

    def __init__(self, path: Path, file: FileIO, header: Header) -> None:
        self.path = path
        self.metadata = header.metadata
        self._file = file
        self._lock = threading.Lock()
        self._entries = {entry.info.name: entry for entry in header.entries}

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Read and check the header.

        Raises `ModelLoadError` with the file, what is wrong, at which byte, and the way out.
        """
        file, size = _open(path)
        try:
            header = read_header(path, file, size)
        except BaseException:
            file.close()
            raise
        return cls(path, file, header)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Headers by GGUF name, in disk order."""
        return {name: entry.info for name, entry in self._entries.items()}

    def type_names(self) -> Mapping[str, str]:
        """What each tensor is stored as ("Q4_1"), by GGUF name."""
        return {name: entry.kind.name for name, entry in self._entries.items()}

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """The tensor or `rows` of it, on the CPU: F32, F16, BF16 as stored, quantised as float32.

        Raises `ModelLoadError` when the file cannot be read or ends before the tensor does.
        """
        import torch

        entry = self._entries.get(name)
        if entry is None:
            raise ModelLoadError(f"{self.path} has no tensor {quote(name)}; {AGAIN}")
        shape, skip = entry.info.shape, 0
        if rows is not None:
            skip = rows.start * entry.info.num_bytes // shape[0]
            shape = (len(rows), *shape[1:])
        dtype = entry.info.dtype
        tensor = allocate(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
        if entry.kind.dequantize is None:
            self._read_into(tensor.reshape(-1).view(torch.uint8).numpy().data, entry, skip)
        else:
            self._dequantize_into(tensor, entry, skip, entry.kind.dequantize)
        return tensor

    def read_floats(self, name: str) -> Floats:
        """A small tensor of type F32 that says what metadata might; without PyTorch.

        Raises `ModelLoadError` when it has another type, or the file ends before it does.
        """
        entry = self._entries[name]
        if entry.kind.name != "F32":
            raise ModelLoadError(
                f"{self.path}: tensor {quote(name)} is {entry.kind.name}, not F32; {AGAIN}"
            )
        values = np.empty(entry.info.shape, np.float32)
        self._read_into(values.data, entry, 0)
        return values

    def close(self) -> None:
        """Close the file; reading afterwards raises `ModelLoadError`."""
        self._file.close()

    def _dequantize_into(
        self, tensor: torch.Tensor, entry: Entry, skip: int, dequantize: Dequantize
    ) -> None:
        kind = entry.kind
        out = tensor.numpy().reshape(-1, kind.block_size)
        step = _CHUNK_VALUES // kind.block_size
        raw = np.empty((min(step, len(out)), kind.block_bytes), np.uint8)
        with np.errstate(all="ignore"):  # scales that are NaN or infinite stay what they are
            for start in range(0, len(out), step):
                blocks = raw[: len(out) - start]
                self._read_into(blocks.data, entry, skip + start * kind.block_bytes)
                dequantize(blocks, out[start : start + step])

    def _read_into(self, buffer: memoryview, entry: Entry, skip: int) -> None:
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
                f"{self.path} ends within tensor {quote(entry.info.name)}: it was cut while "
                f"in use; {AGAIN}"
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
