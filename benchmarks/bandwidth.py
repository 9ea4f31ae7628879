"""How fast this machine reads memory: the ceiling of decode, whose every token reads all weights.

    python -m benchmarks.bandwidth [--gigabytes 4] [--rounds 5]

Threads run a bare read loop (`read_loop.c`, compiled here with cc), each over its own part; with
one thread and with one per core, on huge pages and on small ones. Prints a JSON line per case;
rounds are interleaved. The median is for "share of read bandwidth"; weights lie on huge pages.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.machine import describe

GIGABYTE = 1e9
STEP_BYTES = 512  # what one turn of the loop reads
SOURCE = Path(__file__).with_name("read_loop.c")
Read = Callable[[int, int], int]


def compile_loop(folder: Path) -> Read:
    """The loop as a function of address and number of words; it does not hold the GIL."""
    library = folder / "read_loop.so"
    subprocess.run(
        ["cc", "-O3", "-march=native", "-shared", "-fPIC", str(SOURCE), "-o", str(library)],
        check=True,
    )
    read_all = ctypes.CDLL(str(library)).read_all
    read_all.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    read_all.restype = ctypes.c_uint64
    return read_all


class Memory:
    """Anonymous memory, every page written once."""

    def __init__(self, num_bytes: int, *, huge_pages: bool) -> None:
        self.num_bytes = num_bytes
        self._buffer = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._buffer.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        ctypes.memset(self.address, 1, num_bytes)

    def gb_per_s(self, read: Read, pool: ThreadPoolExecutor, num_threads: int) -> float:
        part = self.num_bytes // num_threads // STEP_BYTES * STEP_BYTES
        start = time.perf_counter()
        addresses = [self.address + index * part for index in range(num_threads)]
        list(pool.map(lambda address: read(address, part // 8), addresses))
        return num_threads * part / GIGABYTE / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0, help="in all")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    num_bytes = int(arguments.gigabytes * GIGABYTE / 2)
    cpus = os.cpu_count() or 1
    memories = {
        "huge": Memory(num_bytes, huge_pages=True),
        "small": Memory(num_bytes, huge_pages=False),
    }
    cases = [(pages, threads) for pages in memories for threads in sorted({1, cpus})]
    speeds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(cpus) as pool:
        read = compile_loop(Path(folder))
        for _ in range(arguments.rounds):
            for pages, threads in cases:
                speed = memories[pages].gb_per_s(read, pool, threads)
                speeds[pages, threads].append(speed)
    for (pages, threads), found in speeds.items():
        line = {
            "benchmark": "read-bandwidth", **describe(), "pages": pages, "threads": threads,
            "value": round(statistics.median(found), 1), "unit": "GB/s", "rounds": len(found),
            "min": round(min(found), 1), "max": round(max(found), 1),
        }  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
