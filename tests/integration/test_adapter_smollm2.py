"""An adapter on the default model, a GGUF of Q4_1 with a tied head: PEFT's outputs."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.config import WorkerConfig
from chatserve.engine.serving import load
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.loader import load_model
from chatserve.models.merge import merge
from tests import adapters, networks
from tests.integration.test_smollm2 import load_judge
from tests.weights import default_model

pytestmark = pytest.mark.weights
IDS = list(range(1000, 1064))


@pytest.fixture(scope="module")
def peft_model() -> Any:
    return adapters.peft_model(load_judge(), r=16, target_modules="all-linear", seed=3)


@pytest.fixture(scope="module")
def adapter(peft_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora")
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if "lora_B" in name:
                weight.mul_(0.05)  # as far as training moves a model
    adapters.save_peft(peft_model, path)
    return path


@torch.no_grad()
def logits(paths: list[Path], **options: Any) -> torch.Tensor:
    checkpoint = merge(open_checkpoint(default_model()), paths)
    with closing(checkpoint.weights):
        model = load_model(checkpoint, choose_policy("cpu", "float32", **options))
    return networks.logits(model, IDS).float()


@torch.no_grad()
def test_logits_are_pefts(adapter: Path, peft_model: Any) -> None:
    judge = peft_model(torch.tensor([IDS])).logits[0]
    ours = logits([adapter])
    assert (ours - judge).abs().max() < 1e-3
    base = logits([])
    assert (ours - base).abs().mean() > 0.1
    error = (logits([adapter], load_8bit=True) - ours).abs().mean()
    usual = (logits([], load_8bit=True) - base).abs().mean()
    assert error < 1.5 * usual


def test_a_packed_file_with_an_adapter_is_served_in_8_bits(adapter: Path) -> None:
    """4 bits of the file's own grid have no room for what an adapter adds."""
    config = WorkerConfig(weights=str(default_model()), device="cpu", adapter=(str(adapter),))
    _, model = load(config)
    if model.description["kernels"] is None:
        pytest.skip("the kernels were not compiled here")
    assert model.description["weight_bits"] == 8
    assert model.description["adapters"] == [adapter.name]
