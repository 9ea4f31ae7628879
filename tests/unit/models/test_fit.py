"""What cannot fit is refused by its headers, before PyTorch is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chatserve.errors import DoesNotFit
from chatserve.models.fit import check_fit_on_cpu
from chatserve.models.packing import Packing
from tests import tiny

HUGE = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 800,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "tiny")
    return tmp_path / "tiny"


def claim(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), "utf-8")


def test_what_fits_is_let_through(folder: Path) -> None:
    check_fit_on_cpu(folder, "auto", None, 512)


@pytest.mark.parametrize("packing", [None, Packing()], ids=str)
def test_what_does_not_fit_is_refused(folder: Path, packing: Packing | None) -> None:
    claim(folder, **HUGE)
    with pytest.raises(DoesNotFit, match=r"GB of weights in .* free; use a smaller model"):
        check_fit_on_cpu(folder, "auto", packing, 512)


def test_what_is_damaged_is_left_to_the_loader(folder: Path, tmp_path: Path) -> None:
    claim(folder, **{**HUGE, "hidden_size": "wide"})
    check_fit_on_cpu(folder, "auto", None, 512)
    check_fit_on_cpu(tmp_path / "nowhere", "auto", None, 512)


REFUSED = """
import sys
from chatserve.config import WorkerConfig
from chatserve.errors import DoesNotFit
from chatserve.server.worker_process import load_engine
try:
    load_engine(WorkerConfig(weights=sys.argv[1], device="cpu"), lambda done, total: None)
except DoesNotFit:
    print("torch" in sys.modules)
"""


def test_a_worker_refuses_without_pytorch(folder: Path) -> None:
    claim(folder, **HUGE)
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n", done.stderr
