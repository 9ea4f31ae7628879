"""Hours of hostile files in the nightly tier: what tests.mutants does not think of.

`FUZZ_SECONDS=1800 make soak` looks for longer.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="make soak installs it")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits hold on Linux alone"),
]

SECONDS = int(os.environ.get("FUZZ_SECONDS", "600"))
PLANTED_SECONDS = 120


def fuzz(name: str, seconds: int, folder: Path, *planted: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.fuzz_files", name, str(seconds), str(folder), *planted]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )


@pytest.mark.timeout(2 * SECONDS + 300)
def test_no_file_gets_more_than_a_refusal(tmp_path: Path) -> None:
    runs = {name: fuzz(name, SECONDS, tmp_path / name) for name in ("gguf", "bin", "pickle")}
    for name, run in runs.items():
        log, _ = run.communicate(timeout=2 * SECONDS + 200)
        assert run.returncode == 0, f"{name}: {log[-3000:]}"
        assert "stat::number_of_executed_units" in log, log[-3000:]


@pytest.mark.timeout(PLANTED_SECONDS + 100)
@pytest.mark.parametrize(("name", "error"), [("gguf", "OverflowError"), ("pickle", "IndexError")])
def test_a_careless_reader_is_found_out(name: str, error: str, tmp_path: Path) -> None:
    run = fuzz(name, PLANTED_SECONDS, tmp_path, "planted")
    log, _ = run.communicate(timeout=PLANTED_SECONDS + 60)
    assert run.returncode != 0 and error in log, log[-3000:]
    assert list(tmp_path.glob("found-*"))
