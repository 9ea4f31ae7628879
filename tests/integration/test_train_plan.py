"""What a training is said to take, beside what one takes: the plan is no less, and not twice it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chatserve.models.config import ModelConfig
from chatserve.train.memory import plan_training
from chatserve.train.recipe import SftRecipe
from tests import tiny, trainings

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4}
TRAINING = """
import re, sys
from chatserve.cli.commands import train
train.main(["sft", "base", "--data", "data", "--out", "run", *sys.argv[1:]])
# not ru_maxrss, which begins with that of the process that has started this one
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
def test_the_plan_covers_a_trainings_peak(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    tiny.save_model(tmp_path / "base", **SIZES)
    trainings.save_data(tmp_path / "data", 60)
    flags = ["--device", "cpu", "--max-steps", "1", "--batch-size", "2", "--max-length", "256"]
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, *flags], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split()[-1])
    network = ModelConfig.from_hf({"architectures": ["LlamaForCausalLM"], **tiny.sizes(**SIZES)})
    recipe = SftRecipe(batch_size=2, max_length=256)
    plan = plan_training(network, recipe, "float32", "cpu", checkpointing=False)
    assert peak <= plan.total_bytes <= 2 * peak
