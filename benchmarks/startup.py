"""Start-up times as a user feels them: `--help`, first prompt, first token of `-p`.

    python -m benchmarks.startup [--repeats 5]

Prints one JSON line; seconds, medians, whole processes. The default model must be in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks.machine import describe

TIMEOUT_S = 60.0


def help_s() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "chatserve", "--help"], capture_output=True, check=True)
    return time.perf_counter() - start


def first_token_s() -> float:
    """From the start of the command to the first byte of the answer on its stdout."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "chatserve.cli", "-p", "Say hello.", "--offline"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        elapsed = time.perf_counter() - start
        process.stdout.read()
    return elapsed


def first_prompt_s() -> float:
    """From the start of the chat to its prompt on a terminal, while the worker loads."""
    start = time.perf_counter()
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "chatserve.cli", "--offline", "--no-save"])
    screen = b""
    elapsed = float("nan")
    while time.perf_counter() - start < TIMEOUT_S:
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            data = os.read(terminal, 4096)
        except OSError:
            break
        screen += data
        if b"\x1b[6n" in data:  # the line editor asks where the cursor is
            os.write(terminal, b"\x1b[1;1R")
        if b"\x1b[0m>" in screen:
            elapsed = time.perf_counter() - start
            os.write(terminal, b"\x04")
            break
    while time.perf_counter() - start < TIMEOUT_S:
        try:
            if not os.read(terminal, 4096):
                break
        except OSError:
            break
    os.close(terminal)
    os.waitpid(pid, 0)
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    measures: dict[str, Callable[[], float]] = {
        "help": help_s,
        "first_prompt": first_prompt_s,
        "first_token_of_prompt_option": first_token_s,
    }
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for repeat in range(-1, repeats):  # the first round fills the page cache
        for name, measure in measures.items():
            elapsed = measure()
            if repeat >= 0:
                seconds[name].append(elapsed)
    medians = {name: round(statistics.median(values), 2) for name, values in seconds.items()}
    print(
        json.dumps({"benchmark": "startup", **describe(), "seconds": medians, "repeats": repeats})
    )


if __name__ == "__main__":
    main()
