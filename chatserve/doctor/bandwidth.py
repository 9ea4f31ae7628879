"""How fast memory is read: the ceiling of generation, whose every token reads all weights.

Weights that fit the processor's cache are read faster than memory, so the ceiling of a model is
taken with a buffer of its size. Measured in about a second, by what every machine has: the C
library's `memcmp` reads two streams at once and computes next to nothing (within a tenth of a loop
written for it; `benchmarks/bandwidth` compiles one). A GPU's memory is read by its own
largest-value kernel.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

BUFFER_BYTES = {"cpu": 384 << 20, "cuda": 1 << 30, "mps": 1 << 30}
"""Over most caches, and written in half a second."""
_STEP_BYTES = 16 << 20
_MEASURE_S = 0.4
_MIN_ROUNDS = 3


@dataclass(frozen=True)
class Bandwidth:
    """The best of some rounds, since whatever else runs can only slow one down."""

    gb_per_s: float
    num_threads: int
    num_bytes: int


def measure(
    device: torch.device, thread_counts: Sequence[int], free_bytes: int, size: int
) -> Bandwidth:
    """Read a buffer on `device` again and again, on a CPU with each number of threads in turn.

    The buffer has about `size` bytes, an eighth of `free_bytes` at most. Raises `OSError` when
    there is too little, or no C library to be found.
    """
    whole = -(-size // _STEP_BYTES) * _STEP_BYTES
    num_bytes = min(whole, free_bytes // 8 // _STEP_BYTES * _STEP_BYTES)
    if num_bytes == 0:
        raise OSError(f"too little memory is free to measure: {free_bytes:,} bytes")
    if device.type == "cpu":
        return _measure_host(num_bytes, sorted({1, *thread_counts}))
    return _measure_device(device, num_bytes)


def _measure_host(num_bytes: int, thread_counts: Sequence[int]) -> Bandwidth:
    compare = _memcmp()
    buffer = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # as weights lie
        buffer.madvise(mmap.MADV_HUGEPAGE)
    first = ctypes.c_char.from_buffer(buffer)
    address = ctypes.addressof(first)
    ctypes.memset(address, 1, num_bytes)

    with ThreadPoolExecutor(max(thread_counts)) as pool:

        def read(num_threads: int) -> None:
            """Each thread compares two halves of its part, which are equal: it reads them all."""
            half = num_bytes // num_threads // 2
            starts = [address + index * 2 * half for index in range(num_threads)]
            list(pool.map(lambda start: compare(start, start + half, half), starts))

        num_threads, seconds = _best_of({count: partial(read, count) for count in thread_counts})
    del first  # the buffer closes only when nothing points into it
    buffer.close()
    return Bandwidth(num_bytes / 1e9 / seconds, num_threads, num_bytes)


def _measure_device(device: torch.device, num_bytes: int) -> Bandwidth:
    values = torch.ones(num_bytes // 4, device=device)
    _, seconds = _best_of({1: lambda: values.max().item()})  # .item() waits for the device
    return Bandwidth(num_bytes / 1e9 / seconds, 1, num_bytes)


def _best_of(cases: dict[int, Callable[[], object]]) -> tuple[int, float]:
    """The key and the seconds of the fastest run; rounds are interleaved."""
    best: tuple[int, float] | None = None
    deadline = time.perf_counter() + _MEASURE_S
    num_rounds = 0
    while num_rounds < _MIN_ROUNDS or time.perf_counter() < deadline:
        for key, run in cases.items():
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            if best is None or seconds < best[1]:
                best = key, seconds
        num_rounds += 1
    assert best is not None
    return best


def _memcmp() -> Callable[[int, int, int], int]:
    """The C library's, which lets go of the interpreter lock. Raises `OSError`."""
    try:
        function = ctypes.CDLL(None).memcmp
    except (AttributeError, TypeError) as error:
        raise OSError(f"no C library to measure with: {error}") from error
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    function.restype = ctypes.c_int
    return function
