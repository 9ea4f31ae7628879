"""How much memory a device has left, and what does not fit in it. No model, no files."""

from __future__ import annotations

import errno
import re
import sys
from typing import TYPE_CHECKING, Any

from chatserve.errors import DoesNotFit, OutOfMemory

if TYPE_CHECKING:
    import torch

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
          "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}  # fmt: skip
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]I?)?B?", re.IGNORECASE)
_MOST = 1 << 60
_ADDRESSES_TO_SPARE = 256 << 20
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory",
    "out of memory", "bad_alloc", "Cannot allocate memory", "can't start new thread",
    "failed to map segment",
)  # fmt: skip


def available_bytes(device: torch.device) -> int:
    """Bytes that this process may still allocate on `device`."""
    if device.type == "cpu":
        return available_host_bytes()
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()


def available_host_bytes() -> int:
    """Bytes of main memory that this process may still allocate; without PyTorch."""
    return min(_available_memory(), address_space_left())


def device_memory(device: str) -> tuple[int, int]:
    """Bytes in use, by whomever, and bytes in all: of main memory, or of all GPUs of the kind.

    (0, 0) for a device that is not there; a device is not woken by the question.
    """
    torch = sys.modules.get("torch")
    if device == "cuda" and torch is not None and torch.cuda.is_initialized():
        each = [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]
        return sum(total - free for free, total in each), sum(total for _, total in each)
    if device == "mps" and torch is not None:
        return torch.mps.driver_allocated_memory(), torch.mps.recommended_max_memory()
    if device != "cpu":
        return 0, 0
    try:
        import psutil
    except ImportError:
        return 0, 0
    memory = psutil.virtual_memory()
    return memory.total - memory.available, memory.total


def resident_bytes() -> int:
    """Main memory that this process has; 0 where that cannot be found out."""
    try:
        import psutil
    except ImportError:
        return 0
    return int(psutil.Process().memory_info().rss)


def _available_memory() -> int:
    try:
        import psutil
    except ImportError:  # engine and models run without it, as on a bare GPU machine
        return _available_from_proc()
    return int(psutil.virtual_memory().available)


def _available_from_proc() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        table = dict(line.split(":", 1) for line in lines)
    return int(table["MemAvailable"].split()[0]) * 1024


def address_space_left() -> int:
    """What `ulimit -v` leaves; practically unlimited without one.

    Stacks of threads and the allocator's arenas take addresses where they take no memory; native
    code that finds none ends the process without a word.
    """
    if sys.platform == "win32":
        return sys.maxsize
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY or not sys.platform.startswith("linux"):
        return sys.maxsize
    with open("/proc/self/statm", encoding="ascii") as line:
        used = int(line.read().split()[0]) * resource.getpagesize()
    return max(0, limit - used - _ADDRESSES_TO_SPARE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is how Python, PyTorch or the system says that there is no memory left.

    PyTorch has a class for it on CUDA only; elsewhere it is in the words. PyTorch itself may be
    what there is no memory for.
    """
    if isinstance(error, MemoryError | DoesNotFit | OutOfMemory):
        return True
    if (torch := sys.modules.get("torch")) and isinstance(error, _torchs_own(torch)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    words = str(error)
    return isinstance(error, RuntimeError | ImportError | OSError) and any(
        each in words for each in _OUT_OF_MEMORY
    )


def _torchs_own(torch: Any) -> tuple[type[BaseException], ...]:
    # it may have stopped in the middle of its own import
    return tuple(filter(None, [getattr(torch, "OutOfMemoryError", None)]))


def in_gb(num_bytes: int) -> str:
    """Decimal gigabytes with one digit, as memory is sold: "13.5 GB"."""
    return f"{num_bytes / 1e9:.1f} GB"


def parse_size(text: str) -> int | None:
    """Bytes of "16GB", "13GiB" or "2000000000"; None where it is no size of a memory."""
    match = _SIZE.fullmatch(text.strip())
    num_bytes = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    return num_bytes if 0 < num_bytes <= _MOST else None
