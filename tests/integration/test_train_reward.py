"""`chatserve train reward`: the loss, what is learnt, and that the served head gives its scores."""

from __future__ import annotations

import json
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chatserve.cli.commands import train
from chatserve.errors import UsageError
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.form import native_config
from chatserve.models.loader import load_model
from chatserve.models.merge import MergedWeights
from chatserve.models.score_head import SCORE_KEY, load_reward_adapter
from chatserve.models.tokenizer import load_tokenizer
from chatserve.train.base import open_base
from chatserve.train.offline import no_network
from chatserve.train.reward_model import TrainedReward
from chatserve.train.texts import training_text
from chatserve.train.training_log import read_log
from tests import networks, trainings

FLAGS = [
    "--device", "cpu", "--max-length", "64", "--learning-rate", "0.01", "--batch-size", "4",
    "--num-epochs", "2",
]  # fmt: skip
TEXTS = [training_text("Is it 3?", each) for each in (trainings.GOOD, trainings.BAD)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    trainings.save_base(folder / "base")
    trainings.save_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    places = ["--data", str(folder / "data"), "--out", str(folder / "run")]
    assert train.main(["reward", str(folder / "base"), *places, *FLAGS]) == 0
    return folder / "run"


def scores(folder: Path, adapter: Path) -> list[float]:
    with no_network():
        return TrainedReward(open_base(folder / "base", device="cpu"), adapter).score(TEXTS)


def test_it_learns_which_side_is_better(run: Path, folder: Path) -> None:
    rows = read_log(run / "log.jsonl")
    assert rows[-1]["eval_accuracy"] == 1.0 and rows[-1]["eval_loss"] < rows[0]["loss"]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    good, bad = scores(folder, run / "adapter")
    assert good > bad
    record = json.loads((run / "adapter" / "chatserve_training.json").read_text("utf-8"))
    assert record["kind"] == "reward" and record["figures"]["eval_accuracy"] == 1.0


def test_the_head_lies_in_the_adapters_file(run: Path) -> None:
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert tensors[SCORE_KEY].shape == (1, 64)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 32, 0.1)
    assert config["task_type"] == "SEQ_CLS"


def test_the_serving_network_gives_the_same_scores(run: Path, folder: Path) -> None:
    checkpoint = open_checkpoint(folder / "base")
    adapter, head = load_reward_adapter(run / "adapter", native_config(checkpoint))
    adapted = replace(checkpoint, weights=MergedWeights(checkpoint.weights, [adapter]))
    with closing(checkpoint.weights):
        network = load_model(adapted, choose_policy("cpu", dtype="float32"))
    tokenizer = load_tokenizer(folder / "base")
    served = []
    for text in TEXTS:
        ids = tokenizer.encode(text, add_bos=tokenizer.adds_bos)
        served.append(head.score(networks.Solo(network).feed_for_states(ids)[-1]).item())
    assert served == pytest.approx(scores(folder, run / "adapter"), abs=1e-3)


def test_the_logged_loss_is_the_published_one(folder: Path) -> None:
    """One step on one batch of four pairs, with a head that still is as it began."""
    places = ["--data", str(folder / "data"), "--out", str(folder / "one")]
    flags = [*FLAGS, "--max-steps", "1", "--lora-dropout", "0", "--batch-size", "24"]
    assert train.main(["reward", str(folder / "base"), *places, *flags]) == 0
    with no_network():
        base = open_base(folder / "base", device="cpu", head="score")
    losses = []
    for number in range(24):
        sides = [f"{each} {number}" for each in (trainings.GOOD, trainings.BAD)]
        ids = [
            torch.tensor([base.processing.encode_text(training_text(f"Is it {number}?", side))])
            for side in sides
        ]
        with torch.no_grad():
            good, bad = (base.model(input_ids=each).logits.item() for each in ids)
        losses.append(math.log(1 + math.exp(bad - good)))
    logged = read_log(folder / "one" / "log.jsonl")[0]["loss"]
    assert logged == pytest.approx(sum(losses) / 24, abs=1e-5)


def test_pairs_that_are_too_long_are_left_out(folder: Path) -> None:
    places = ["--data", str(folder / "data"), "--out", str(folder / "short")]
    with pytest.raises(UsageError, match=r"no pair of at most 8 tokens.*--max-length"):
        train.main(
            ["reward", str(folder / "base"), *places, "--device", "cpu", "--max-length", "8"]
        )
