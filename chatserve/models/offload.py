"""Blocks whose weights lie in main memory or on the disk, and on their device while they compute.

The next one is copied by a thread while the network computes. Knows tensors and blocks; which ones
are offloaded is decided in `device_map`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from chatserve.errors import DoesNotFit
from chatserve.models.llama import Block

_ALIGNMENT = 64  # bytes, of tensors in a file


class Computed(Protocol):
    """A moment on a device, which may be still to come."""

    def synchronize(self) -> None:
        """Wait for it."""


class _Slot(NamedTuple):
    """Where a block keeps one of its tensors."""

    owner: Any
    name: str


class StoredBlock:
    """A block that computes on `device`, with its tensors in main memory or a file of `folder`."""

    def __init__(self, block: Block, device: torch.device, folder: Path | None = None) -> None:
        """Moves the tensors of `block`, which need no content yet.

        Raises `DoesNotFit` when the disk of `folder` has no room for them.
        """
        self._device = device
        self._slots = list(_slots(block))
        shapes = [getattr(slot.owner, slot.name) for slot in self._slots]
        self._stored = _in_memory(shapes) if folder is None else _in_file(shapes, folder)
        self._put(self._stored)

    @contextlib.contextmanager
    def holding(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """The block computes with `tensors`, which `copy` made."""
        self._put(tensors)
        try:
            yield
        finally:
            self._put(self._stored)

    def copy(self, after: Computed | None = None) -> list[torch.Tensor]:
        """The tensors on the device, whatever thread asks; they are whole on return.

        after: what has to be computed before, so that its memory can be taken again.
        """
        if after is not None:
            after.synchronize()
        if self._device.type != "cuda":
            return [tensor.to(self._device, copy=True) for tensor in self._stored]
        stream = _stream(self._device)
        with torch.cuda.stream(stream):
            tensors = [tensor.to(self._device, non_blocking=True) for tensor in self._stored]
        stream.synchronize()
        return tensors

    def computed(self) -> Computed | None:
        """The moment when the device has done what it was told so far; None for one at once."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # PyTorch's
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _put(self, tensors: Sequence[torch.Tensor]) -> None:
        for slot, tensor in zip(self._slots, tensors, strict=True):
            setattr(slot.owner, slot.name, tensor)


class Carrier:
    """Copies stored blocks to their device, each while the network is still at the one before.

    Not earlier: two at a time are on the device, however far ahead of it this process is. After the
    last comes the first: it is there when the next step begins.
    """

    def __init__(self, blocks: Mapping[int, StoredBlock]) -> None:
        """`blocks` by layer, in their order."""
        self._blocks = blocks
        layers = list(blocks)
        self._after = dict(zip(layers, [*layers[1:], *layers[:1]], strict=True))
        self._thread = ThreadPoolExecutor(1, "offload")
        self._coming: tuple[int, Future[list[torch.Tensor]]] | None = None
        self._computed: Computed | None = None

    @contextlib.contextmanager
    def __call__(self, layer: int) -> Iterator[None]:
        """The layer's block is on its device as long as the context lasts."""
        block = self._blocks.get(layer)
        if block is None:
            yield
            return
        with block.holding(self._bring(layer)):
            yield
        self._computed = block.computed()

    def _bring(self, layer: int) -> list[torch.Tensor]:
        """The tensors of `layer` on its device; starts to copy the next one's."""
        if self._coming is None or self._coming[0] != layer:
            self._coming = self._start(layer)
        coming, self._coming = self._coming[1], None
        tensors = coming.result()
        for tensor in tensors:
            if tensor.is_cuda:  # it came on another stream, and must outlive what reads it here
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        self._coming = self._start(self._after[layer])
        return tensors

    def _start(self, layer: int) -> tuple[int, Future[list[torch.Tensor]]]:
        copy = torch.inference_mode()(self._blocks[layer].copy)
        return layer, self._thread.submit(copy, self._computed)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all copies to a device: PyTorch keeps freed memory for each stream apart."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # PyTorch's


def _slots(owner: Any) -> Iterator[_Slot]:
    for name, value in vars(owner).items():
        if isinstance(value, torch.Tensor):
            yield _Slot(owner, name)
        elif type(value).__module__.startswith("chatserve.models.") and hasattr(value, "__dict__"):
            yield from _slots(value)


def _in_memory(shapes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.empty_like(shape, device="cpu") for shape in shapes]


def _in_file(shapes: Sequence[torch.Tensor], folder: Path) -> list[torch.Tensor]:
    """Tensors over one file, whose pages come and go as memory allows.

    It has no name any more, so it is gone with the process, however that ends.
    """
    starts = [0]
    for shape in shapes:
        starts.append(-(-(starts[-1] + shape.nbytes) // _ALIGNMENT) * _ALIGNMENT)
    with _named(folder, starts[-1]) as path:
        mapped = torch.from_file(str(path), shared=True, size=starts[-1], dtype=torch.uint8)
    return [
        mapped[start : start + shape.nbytes].view(shape.dtype).view(shape.shape)
        for start, shape in zip(starts, shapes, strict=False)
    ]


@contextlib.contextmanager
def _named(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file of so many bytes, all of them set aside on the disk: a hole would end in SIGBUS."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix="offload-")
    except OSError as error:
        raise _no_room(folder, num_bytes, error) from error
    try:
        os.posix_fallocate(handle, 0, num_bytes)
        yield Path(name)
    except OSError as error:
        raise _no_room(folder, num_bytes, error) from error
    finally:
        os.close(handle)
        os.unlink(name)


def _no_room(folder: Path, num_bytes: int, error: OSError) -> DoesNotFit:
    return DoesNotFit(
        f"cannot keep a layer of {math.ceil(num_bytes / 1e6):,} MB in {folder} ({error.strerror}); "
        "free some space, set CHATSERVE_HOME to another disk, or use --load-8bit"
    )
