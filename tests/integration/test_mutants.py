"""200 damaged files of each format: read as they are or refused by name, within time and memory.

`MUTANTS=20000 pytest tests/integration/test_mutants.py` looks for longer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="limits on the address space hold on Linux alone"
)

COUNT = int(os.environ.get("MUTANTS", "200"))
FORMATS = ("safetensors", "bin", "gguf", "lora", "delta")
# what a planted fault looks like from outside
PLANTED = {
    "sizes": "MemoryError",  # buffers as large as a header says
    "loop": "ran for more than",
    "struct": "error: unpack",  # the reader's own exception comes out
    "zeros": "Unequal",
}
Report = Mapping[str, Any]


@pytest.fixture(scope="module")
def reports() -> Mapping[str, Report]:
    jobs = [f"{name}:{COUNT}" for name in FORMATS]
    jobs += [f"safetensors:100:{fault}" for fault in PLANTED]
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants", *jobs], capture_output=True, text=True, check=True,
        timeout=60 + COUNT,
    )  # fmt: skip
    return {report["job"]: report for report in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", FORMATS)
def test_every_mutant_is_read_as_it_is_or_refused(name: str, reports: Mapping[str, Report]) -> None:
    report = reports[f"{name}:{COUNT}"]
    assert report["failures"] == []
    assert report["loaded"] + report["refused"] == COUNT
    assert min(report["loaded"], report["refused"]) > COUNT // 20  # the faults bite, not all


@pytest.mark.parametrize("fault", PLANTED)
def test_a_careless_reader_is_found_out(fault: str, reports: Mapping[str, Report]) -> None:
    failures = reports[f"safetensors:100:{fault}"]["failures"]
    assert any(PLANTED[fault] in failure[-1] for failure in failures), failures
