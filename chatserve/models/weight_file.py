"""One open weight file: bytes and tensors by offset, each range checked against the file's size.

Plain reads into fresh memory, never a mapping of the file: its pages would count as resident until
the file is closed. Knows no file format.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from chatserve.errors import ModelLoadError
from chatserve.models.weights import ITEM_BYTES

if TYPE_CHECKING:
    import torch

_MIN_MAPPED_BYTES = 1 << 20
LFS_POINTER = b"version https://git-lfs"


class WeightFile:
    """An open file of weights. `read` and `read_tensor` may be called from several threads."""

    def __init__(self, path: Path) -> None:
        """Raises `ModelLoadError` when the file cannot be opened or is a Git LFS placeholder."""
        self.path = path
        self._lock = threading.Lock()
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115, closed by close()
        except OSError as error:
            raise ModelLoadError(f"{path}: cannot be opened ({error.strerror})") from error
        self.size = os.fstat(self._file.fileno()).st_size
        if self.read(0, min(self.size, len(LFS_POINTER))) == LFS_POINTER:
            self.close()
            raise ModelLoadError(f"{path}: is a Git LFS placeholder; fetch it with `git lfs pull`")

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Exactly `num_bytes` from `offset`; for headers. Raises `ModelLoadError`."""
        buffer = bytearray(self._checked(offset, num_bytes))
        self._fill(memoryview(buffer), offset)
        return bytes(buffer)

    def read_tensor(
        self, offset: int, shape: tuple[int, ...], dtype_name: str, rows: range | None = None
    ) -> torch.Tensor:
        """A contiguous CPU tensor from the bytes at `offset`, or only `rows` of it.

        Raises `ModelLoadError`.
        """
        import torch

        if rows is not None:
            offset += rows.start * math.prod(shape[1:]) * ITEM_BYTES[dtype_name]
            shape = (len(rows), *shape[1:])
        num_bytes = self._checked(offset, math.prod(shape) * ITEM_BYTES[dtype_name])
        buffer = allocate(num_bytes)
        self._fill(buffer.numpy().data, offset)
        # A bool whose byte is neither 0 nor 1 behaves differently from kernel to kernel.
        flat = buffer.ne(0) if dtype_name == "bool" else buffer.view(getattr(torch, dtype_name))
        return flat.reshape(shape)

    def read_into(self, offset: int, out: torch.Tensor) -> None:
        """The bytes at `offset` as the content of `out`, contiguous on the CPU; no bools.

        Raises `ModelLoadError`.
        """
        import torch

        self._checked(offset, out.numel() * out.element_size())
        self._fill(out.reshape(-1).view(torch.uint8).numpy().data, offset)

    def close(self) -> None:
        self._file.close()

    def _checked(self, offset: int, num_bytes: int) -> int:
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self.size:
            raise ModelLoadError(
                f"{self.path}: truncated: bytes {offset} to {offset + num_bytes} are wanted, the "
                f"file has {self.size}; download it again"
            )
        return num_bytes

    def _fill(self, view: memoryview, offset: int) -> None:
        done = 0
        try:
            while done < len(view):
                count = self._read_at(view[done:], offset + done)
                if not count:
                    raise ModelLoadError(f"{self.path}: became shorter while it was read")
                done += count
        except OSError as error:
            raise ModelLoadError(f"{self.path}: cannot be read ({error.strerror})") from error

    def _read_at(self, view: memoryview, offset: int) -> int:
        """As many bytes as the system gives at once; 0 at the end of the file."""
        if hasattr(os, "preadv"):  # threads read side by side
            return os.preadv(self._file.fileno(), [view], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(view)


def allocate(num_bytes: int) -> torch.Tensor:
    """Uninitialised bytes whose memory goes back to the system together with the tensor.

    From the C allocator, tensors that come and go in turn grow the heap hole by hole: ten tensors
    of 16 MB read one after another left up to eight of them resident.
    """
    import torch

    if num_bytes < _MIN_MAPPED_BYTES:
        return torch.empty(num_bytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)
