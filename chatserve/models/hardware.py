"""What this machine has, told without PyTorch where that is possible: it takes a second to import.

Where files do not say, PyTorch is asked; its answer is the one that counts.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_FIRST_PROCESSOR_BYTES = 1 << 14
# NVIDIA on Linux, AMD, and either inside of Windows' Linux
_GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))


def multiplies_bfloat16() -> bool:
    """Whether PyTorch's products in bfloat16 run on this CPU's own."""
    if sys.platform == "linux" and platform.machine() == "x86_64":
        return "avx512_bf16" in _flags()
    import torch

    return bool(
        torch.cpu._is_avx512_bf16_supported() or torch.backends.cpu.get_cpu_capability() == "SVE256"
    )


def gpu_kinds() -> list[str]:
    """Kinds of GPU that are here, as PyTorch calls them; the one it would take first."""
    if sys.platform == "linux" and not any(driver.exists() for driver in _GPU_DRIVERS):
        return []
    import torch

    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [kind for kind, is_here in here.items() if is_here]


def _flags() -> list[str]:
    with open(_CPU_INFO, encoding="ascii", errors="replace") as lines:
        text = lines.read(_FIRST_PROCESSOR_BYTES)
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return value.split()
    return []
