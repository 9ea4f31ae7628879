"""A trained reward model on a base in memory scores as PEFT's own network does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from chatserve.errors import ModelLoadError
from chatserve.train.adapter_folder import save_adapter
from chatserve.train.base import TrainingBase, open_base
from chatserve.train.offline import no_network
from chatserve.train.recipe import RewardRecipe
from chatserve.train.reward_model import TrainedReward
from chatserve.train.run_folder import RunFolder
from tests import tiny

TEXTS = ["Question: a\n\nAnswer: b", "Question: long and longer?\n\nAnswer: yes, it is", "x"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A base, a reward adapter with random weights for it, and PEFT's model of both."""
    path = tmp_path_factory.mktemp("base")
    tiny.save_model(path)
    with no_network():
        base = open_base(path, device="cpu", head="score")
        lora = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=32, target_modules=["q_proj"])
        model = peft.get_peft_model(base.model, lora)
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.1)
        run = RunFolder(path / "run")
        run.begin({})
        folder = save_adapter(run, model, base, kind="reward", recipe=RewardRecipe(), steps=1)
    return path, folder, model.eval()


def opened(path: Path) -> TrainingBase:
    with no_network():
        return open_base(path, device="cpu")


def theirs(base: TrainingBase, model: Any) -> list[float]:
    ids = [torch.tensor([base.processing.encode_text(text)]) for text in TEXTS]
    with torch.no_grad():
        return [model(input_ids=each).logits.item() for each in ids]


def test_scores_are_pefts(trained: tuple[Path, Path, Any]) -> None:
    path, folder, model = trained
    base = opened(path)
    scores = TrainedReward(base, folder).score(TEXTS, batch_size=2)
    assert scores == pytest.approx(theirs(base, model), abs=1e-5)
    assert len(set(scores)) == 3


def test_a_policys_adapter_rests_while_scores_are_made(trained: tuple[Path, Path, Any]) -> None:
    path, folder, model = trained
    base = opened(path)
    with no_network():
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
        policy = peft.get_peft_model(base.model, lora)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    policy.train()
    ids = torch.tensor([base.processing.encode_text(TEXTS[0])])
    before = policy.eval()(input_ids=ids).logits
    trainable = {name for name, each in policy.named_parameters() if each.requires_grad}
    scores = TrainedReward(base, folder).score(TEXTS)
    assert scores == pytest.approx(theirs(base, model), abs=1e-5)
    assert policy(input_ids=ids).logits.equal(before)
    assert trainable == {name for name, each in policy.named_parameters() if each.requires_grad}


def test_the_record_has_no_date_and_an_adapter_of_another_base_is_refused(
    trained: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    path, folder, _ = trained
    record = json.loads((folder / "chatserve_training.json").read_text("utf-8"))
    assert record["kind"] == "reward" and record["steps"] == 1
    assert record["template"] == "Question: {question}\n\nAnswer: {answer}"
    assert record["base_fingerprint"] == opened(path).fingerprint
    assert sorted(each.name for each in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "chatserve_training.json",
    ]  # fmt: skip
    tiny.save_model(tmp_path, seed=1)
    with pytest.raises(ModelLoadError, match="use it with its own base"):
        TrainedReward(opened(tmp_path), folder)
