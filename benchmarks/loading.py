"""How long weights take to load, beside reading the same bytes: half precision, 8 and 4 bits.

    python -m benchmarks.loading WEIGHTS [--repeats 5]

Prints one JSON line: medians of seconds, each measured in a process of its own, in turns. The
files have been read before. `read`: one file after another into a buffer that is used again.
`read_and_keep`: into fresh memory, which every loader needs: the first touch of a page costs more
than its bytes. `half_ratio` is half over read_and_keep, `quantise_ratio` 8 bits over half,
`quantise_4bit_ratio` 4 bits: of each turn, then the median.

Before each of these, the process takes as much memory as it will need, in huge pages, and gives
it back: a virtual machine's host takes free huge pages away within seconds, and giving them back
takes it longer than all else. Packed weights lie in huge pages and meet this first; half precision
gets small ones, of which some are always at hand. `8bit_as_found` goes without,
`8bit_small_pages` too and takes no huge pages; their ratios are over `half_as_found`.
`cpu_seconds`: user and system time, which a busy host does not stretch.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.machine import describe

_STEP_BYTES = 8 << 20
_AT_HAND = {"read": 0.1, "read_and_keep": 1.1, "half": 1.1, "8bit": 0.7, "4bit": 0.5}
"""The share of the files' size that each form takes in memory, or more."""
_FORMS = (*_AT_HAND, "half_as_found", "8bit_as_found", "8bit_small_pages")
_PR_SET_THP_DISABLE = 41


def files_of(weights: Path) -> list[Path]:
    """The files that hold the weights."""
    if weights.is_file():
        return [weights]
    from chatserve.models.weight_files import find_weight_files

    return list(find_weight_files(weights).paths)


def size_of(weights: Path) -> int:
    return sum(os.stat(file).st_size for file in files_of(weights))


def read(weights: Path) -> None:
    buffer = memoryview(bytearray(_STEP_BYTES))
    for file in files_of(weights):
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def read_and_keep(weights: Path) -> list[object]:
    import torch

    kept: list[object] = []
    for file in files_of(weights):
        memory = torch.empty(file.stat().st_size, dtype=torch.uint8)
        view = memory.numpy().data
        with open(file, "rb", buffering=0) as handle:
            while count := handle.readinto(view[:_STEP_BYTES]):
                view = view[count:]
        kept.append(memory)
    return kept


def loader(weights: Path, form: str) -> Callable[[], object]:
    """Everything that is imported, chosen and checked before is not measured."""
    from chatserve.models.checkpoint import open_checkpoint
    from chatserve.models.device import choose_policy
    from chatserve.models.loader import load_model

    is_8bit, is_4bit = form.startswith("8bit"), form.startswith("4bit")
    dtype = "auto" if is_8bit or is_4bit else dtype_of(weights)
    policy = choose_policy("cpu", dtype, load_8bit=is_8bit, load_4bit=is_4bit)
    return lambda: load_model(open_checkpoint(weights), policy)


def bring_to_hand(num_bytes: int) -> None:
    """Memory that the system can give at once afterwards, in huge pages where it has them."""
    with mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, num_bytes, mmap.PAGESIZE):
            pages[start] = 1


def dtype_of(weights: Path) -> str:
    """What most of the weights are stored as."""
    from chatserve.models.checkpoint import open_checkpoint

    infos = open_checkpoint(weights).weights.tensors().values()
    return max(infos, key=lambda info: info.num_bytes).dtype_name


def measure(form: str, weights: Path) -> dict[str, float]:
    """In this process."""
    import torch  # noqa: F401  # in none of the times

    if form == "8bit_small_pages" and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    readers: dict[str, Callable[[Path], object]] = {"read": read, "read_and_keep": read_and_keep}
    run = partial(readers[form], weights) if form in readers else loader(weights, form)
    if share := _AT_HAND.get(form):
        bring_to_hand(int(share * size_of(weights)))
    start, cpu = time.perf_counter(), time.process_time()
    kept = run()
    result = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    del kept
    return result


def measure_apart(form: str, weights: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.loading", str(weights), "--one", form]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def report(turns: list[dict[str, dict[str, float]]]) -> dict[str, object]:
    """Medians over turns."""

    def median(form: str, what: str) -> float:
        return round(statistics.median(turn[form][what] for turn in turns), 3)

    def ratio(above: str, below: str, what: str = "seconds") -> float:
        return round(statistics.median(t[above][what] / t[below][what] for t in turns), 2)

    return {
        "seconds": {form: median(form, "seconds") for form in _FORMS},
        "cpu_seconds": {form: median(form, "cpu") for form in _FORMS},
        "half_ratio": ratio("half", "read_and_keep"),
        "half_to_read_ratio": ratio("half", "read"),
        "quantise_ratio": ratio("8bit", "half"),
        "quantise_4bit_ratio": ratio("4bit", "half"),
        "quantise_as_found_ratio": ratio("8bit_as_found", "half_as_found"),
        "quantise_small_pages_ratio": ratio("8bit_small_pages", "half_as_found"),
        "repeats": len(turns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", choices=_FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.weights)))
        return
    facts = describe()
    read(options.weights)  # the page cache
    turns = [
        {form: measure_apart(form, options.weights) for form in _FORMS}
        for _ in range(options.repeats)
    ]
    num_bytes = size_of(options.weights)
    name = options.weights.resolve().parent.name
    line = {"benchmark": "loading", "weights": name, "num_bytes": num_bytes}
    print(json.dumps({**line, **facts, **report(turns)}))


if __name__ == "__main__":
    main()
