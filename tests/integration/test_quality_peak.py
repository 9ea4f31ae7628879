"""The promise about memory: quality holds one layer, however many the model has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.processes import environment

SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
NUM_LAYERS = (6, 14)
LAYER_WEIGHTS = (2 * 512 + 2 * 128) * 512 + 3 * 2048 * 512
_PEAKS = """
import re, sys
from pathlib import Path
from chatserve.models.device import choose_policy
from chatserve.quality.assess import Question, assess
from chatserve.quality import served
if sys.argv.pop(1) == "hold":
    held = []
    begin = served.KernelForm.begin_layer
    def kept(self, index):
        held.append(self._model)
        self._model = None
        begin(self, index)
    served.KernelForm.begin_layer = kept
policies = [choose_policy("cpu", load_8bit=True)]
for folder in sys.argv[1:]:
    assess(Question(Path(folder), policies, "auto", None, 400))
    status = Path("/proc/self/status").read_text()
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    parent = tmp_path_factory.mktemp("models")
    for number in NUM_LAYERS:
        folder = parent / str(number)
        tiny.save_model(folder, dtype=torch.bfloat16, num_hidden_layers=number, **SIZES)
    return [str(parent / str(number)) for number in NUM_LAYERS]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
@pytest.mark.parametrize("way", ["free", "hold"])
def test_more_layers_take_no_more_memory(way: str, folders: list[str]) -> None:
    """And layers that were held would show."""
    result = subprocess.run(
        [sys.executable, "-c", _PEAKS, way, *folders],
        env=environment(), capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    few, many = map(int, result.stdout.splitlines())
    more_bytes = (NUM_LAYERS[1] - NUM_LAYERS[0]) * LAYER_WEIGHTS  # in 8 bits
    assert (many - few < more_bytes / 2) == (way == "free"), (few, many)
