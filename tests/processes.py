"""Whole programs as a user starts them: run to the end, or kept running and looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

TIMEOUT_S = 120


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, with small thread pools and no network by accident."""
    # nor do chats join a server that happens to run here
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CHATSERVE_PRIVATE": "1"}
    return {**os.environ, **quiet, **changes}


def run_chatserve(
    *arguments: str | Path, stdin: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """`python -m chatserve ARGUMENTS` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "chatserve", *map(str, arguments)],
        input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S,
        env=environment(**variables), check=False,
    )  # fmt: skip


def descendants(pid: int) -> list[psutil.Process]:
    """All processes below `pid`."""
    return psutil.Process(pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process], timeout_s: float = 5.0) -> None:
    """None of them is alive after at most `timeout_s`."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    assert not [process.cmdline() for process in alive]
