"""Every byte is read, by as many threads as asked for, and a lack of memory is an error."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from chatserve.doctor import bandwidth
from chatserve.doctor.bandwidth import measure

CPU = torch.device("cpu")
STEP = 16 << 20


def test_memory_is_read() -> None:
    found = measure(CPU, (2,), 1 << 40, STEP)
    assert found.gb_per_s > 0 and found.num_threads in (1, 2) and found.num_bytes == STEP


def test_whole_steps_that_fit_into_an_eighth() -> None:
    assert measure(CPU, (1,), 1 << 40, STEP + 1).num_bytes == 2 * STEP
    assert measure(CPU, (1,), 8 * STEP + 9, 5 * STEP).num_bytes == STEP


def test_too_little_memory() -> None:
    with pytest.raises(OSError, match="too little memory is free to measure: 9 bytes"):
        measure(CPU, (1,), 9, STEP)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_threads_share_all_bytes(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[int, int] = {}

    def compare(first: int, second: int, size: int) -> int:
        read[first], read[second] = size, size
        return 0

    monkeypatch.setattr(bandwidth, "_memcmp", lambda: compare)
    # one number of threads at a time, so that the parts do not overlap
    monkeypatch.setattr(bandwidth, "_best_of", last_of)
    bandwidth._measure_host(STEP, [num_threads])
    starts = sorted(read)
    assert len(starts) == 2 * num_threads
    assert all(start + read[start] == after for start, after in pairwise(starts))
    assert STEP - sum(read.values()) < 2 * num_threads


def last_of(cases: dict[int, Callable[[], object]]) -> tuple[int, float]:
    key, run = cases.popitem()
    run()
    return key, 1.0


def test_the_fastest_round_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [(0, 5), (5, 8), (10, 20), (20, 22), (30, 34), (40, 49)]  # of case 1 and 2 in turn
    clock = iter([0, *(moment for pair in rounds for moment in pair), 200])
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: next(clock))
    assert bandwidth._best_of({1: lambda: None, 2: lambda: None}) == (2, 2)


def test_a_device_reads_with_its_own_kernel() -> None:
    assert bandwidth._measure_device(CPU, STEP).gb_per_s > 0


def test_no_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: None) -> None:
        raise TypeError("not on this system")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    with pytest.raises(OSError, match="no C library to measure with: not on this system"):
        measure(CPU, (1,), 1 << 40, STEP)
