"""The promise about memory: apply-delta holds some rows, however large a tensor or a file is."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.apply_delta import SHAPES, Shape, infos, make
from chatserve.models.manifest import MAX_PART_BYTES
from chatserve.models.safetensors_file import SafetensorsFile
from tests.processes import environment

ROOT = Path(__file__).parents[2]
# 131 MB for the embedding, as much for the head
LARGE = Shape(layers=1, hidden=2048, ffn=1024, heads=16)
SLACK_BYTES = 32 << 20
_PEAK = """
import resource, sys, psutil, torch
from pathlib import Path
from chatserve.cli.main import main
import chatserve.cli.commands.apply_delta, chatserve.models.delta
import chatserve.models.manifest as manifest
manifest.MAX_PART_BYTES = int(sys.argv.pop(1))
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
ballast = []
while psutil.Process().memory_info().rss < peak():  # importing torch peaked higher than this
    ballast.append(torch.ones(1 << 18))
before = peak()
assert main(["apply-delta", *sys.argv[1:], "--verify"]) == 0
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Removed when its tests are done: pytest keeps what it finds for days."""
    folder = tmp_path_factory.mktemp("large")
    make(folder, LARGE, is_v0=True)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("part_bytes", [MAX_PART_BYTES, 1 << 40])
def test_the_peak_is_some_rows(part_bytes: int, large: Path) -> None:
    """And whole tensors would show."""
    places = [str(large / name) for name in ("base", "delta", str(part_bytes))]
    result = subprocess.run(
        [sys.executable, "-c", _PEAK, str(part_bytes), *places],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    peak_bytes = int(result.stdout.splitlines()[-1])
    assert (peak_bytes < SLACK_BYTES) == (part_bytes == MAX_PART_BYTES)


def run(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.apply_delta", *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return result.stdout


def test_the_benchmark_runs(tmp_path: Path) -> None:
    """No timing decides anything here."""
    assert not run("--make", str(tmp_path), "--shape", "tiny")
    base, delta = str(tmp_path / "base"), str(tmp_path / "delta")
    (line,) = map(json.loads, run(base, delta, "--repeats", "1").splitlines())
    assert line["benchmark"] == "apply_delta" and line["repeats"] == 1
    assert line["delta_bytes"] > 2 * num_weights(SHAPES["tiny"], added_rows=1)
    assert line["peak_rss_bytes"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta"]


def test_no_row_comes_twice_where_that_is_wanted(tmp_path: Path) -> None:
    make(tmp_path, Shape(1, 512, 64, 4, 3000), is_v0=False, is_fresh=True)
    for name in ("base", "delta"):
        (path,) = (tmp_path / name).glob("*.safetensors")
        with closing(SafetensorsFile(path)) as weights:
            rows = weights.read("model.embed_tokens.weight")
        assert len(rows.unique(dim=0)) == len(rows)
        assert rows.nbytes > 2 * MAX_PART_BYTES  # which are written one after the other


def num_weights(shape: Shape, *, added_rows: int = 0) -> int:
    return sum(math.prod(info.shape) for info in infos(shape, shape.vocab + added_rows))


def test_the_shapes_are_those_of_llama() -> None:
    assert num_weights(SHAPES["7b"]) == 6_738_415_616
    assert num_weights(SHAPES["13b"]) == 13_015_864_320
