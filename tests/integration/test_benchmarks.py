"""The benchmarks still run: a tiny model is made, measured in both modes and judged.

No timing decides anything here. Peers are left to a person: see benchmarks/peers.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from benchmarks.models.__main__ import make_model
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.tokenizer import load_tokenizer
from tests.processes import TIMEOUT_S, environment
from tests.weights import default_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    default_model()
    folder = tmp_path_factory.mktemp("models")
    make_model("tiny", folder, ["hf", "bf16"])
    yield folder


def run(*arguments: str | Path) -> list[dict[str, Any]]:
    """A benchmark to its end; the lines it printed."""
    result = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True, text=True, timeout=TIMEOUT_S, env=environment(), cwd=ROOT,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_folder_and_gguf_hold_the_same_model(models: Path) -> None:
    folder, file = models / "tiny" / "hf", models / "tiny" / "bf16.gguf"
    first, second = open_checkpoint(folder), open_checkpoint(file)
    with closing(first.weights), closing(second.weights):
        assert first.weights.tensors().keys() == second.weights.tensors().keys()
        for name in first.weights.tensors():
            ours, theirs = first.weights.read(name), second.weights.read(name)
            assert torch.equal(ours.float(), theirs.float()), name
    text = "def f(x): return 12345 * x  # ünïcödé"
    expected = load_tokenizer(default_model()).encode(text, add_bos=False)
    assert load_tokenizer(folder).encode(text, add_bos=False) == expected
    assert load_tokenizer(file).encode(text, add_bos=False) == expected
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds == {"F32", "BF16"}


def test_chatserve_is_measured_in_process_and_over_http(models: Path) -> None:
    lines = run(
        "benchmarks", "--model", "tiny", "--models", models, "--trial", "--rounds", "1",
        "--peers", "chatserve", "--chatserve", "bf16",
    )  # fmt: skip
    assert {line["what"] for line in lines} == {
        "prefill", "decode", "memory", "startup", "first-token", "streams", "cpu", "idle",
    }  # fmt: skip
    assert {line["peer"] for line in lines} == {"chatserve bf16"}
    assert all(line["commit"] and line["cpus"] and line["unit"] for line in lines)
    # CPU per token is a difference of two runs and may come out below nothing in tiny ones
    assert all(line["value"] > 0 for line in lines if line["what"] not in ("cpu", "idle"))


def test_quality_of_uncompressed_weights_is_exact(models: Path) -> None:
    (line,) = run("benchmarks.quality", models / "tiny" / "hf", "--forms", "fp32", "--step", "100")
    assert line["positions"] >= 500
    assert line["mean_kl"] < 1e-4 and line["top1_percent"] > 99.9


def test_bandwidth_is_read(tmp_path: Path) -> None:
    lines = run("benchmarks.bandwidth", "--gigabytes", "0.02", "--rounds", "1")
    assert {line["pages"] for line in lines} == {"huge", "small"}
    assert all(line["value"] > 0 for line in lines)


def test_loading_is_measured_beside_reading(models: Path) -> None:
    (line,) = run("benchmarks.loading", models / "tiny" / "hf", "--repeats", "1")
    forms = ["read", "read_and_keep", "half", "8bit", "4bit"]
    forms += ["half_as_found", "8bit_as_found", "8bit_small_pages"]
    assert list(line["seconds"]) == forms
    assert all(value > 0 for value in line["cpu_seconds"].values())
    assert line["num_bytes"] == (models / "tiny" / "hf" / "model.safetensors").stat().st_size
    assert min(value for name, value in line.items() if name.endswith("_ratio")) > 0
