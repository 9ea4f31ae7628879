"""What the kernel says of processes: CPU time, memory, load of the whole machine. Linux only."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_NS_PER_S = 1e9
_SHORTEST_S = 0.2  # the kernel counts load in ticks of 10 ms


def tree(pid: int) -> list[int]:
    """`pid` and everything that it started."""
    process = psutil.Process(pid)
    return [pid, *(child.pid for child in process.children(recursive=True))]


def cpu_s(pid: int, *, main_thread_only: bool = False) -> float:
    """CPU time of a process so far, from the scheduler's own clock (nanoseconds, no ticks)."""
    tasks = Path(f"/proc/{pid}/task")
    threads = [str(pid)] if main_thread_only else os.listdir(tasks)
    total = 0
    for thread in threads:
        with contextlib.suppress(FileNotFoundError):  # a thread may end meanwhile
            total += int((tasks / thread / "schedstat").read_text("ascii").split()[0])
    return total / _NS_PER_S


def memory_bytes(pids: list[int]) -> dict[str, float]:
    """Peak resident size (of each process, summed) and share of physical memory right now."""
    peak = sum(_kilobytes(Path(f"/proc/{pid}/status"), "VmHWM:") for pid in pids)
    share = sum(_kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss:") for pid in pids)
    return {"peak_rss_bytes": 1024.0 * peak, "pss_bytes": 1024.0 * share}


def _kilobytes(path: Path, key: str) -> int:
    lines = path.read_text("ascii").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)


@dataclass
class Foreign:
    """CPU that others took while something was measured, in cores."""

    cores: float = 0.0


@contextlib.contextmanager
def foreign_cpu() -> Iterator[Foreign]:
    """Fills in, at the end, what neither this process nor its children used; stolen time counts."""
    result = Foreign()
    start, busy, own = time.perf_counter(), _busy_s(), _own_s()
    yield result
    elapsed = time.perf_counter() - start
    if elapsed > _SHORTEST_S:
        result.cores = max(0.0, _busy_s() - busy - (_own_s() - own)) / elapsed


def _busy_s() -> float:
    fields = Path("/proc/stat").read_text("ascii").splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S


def _own_s() -> float:
    """This process, its children that have ended, and those that live."""
    total = 0.0
    for pid in tree(os.getpid()):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(psutil.Process(pid).cpu_times()[:4])
    return total
