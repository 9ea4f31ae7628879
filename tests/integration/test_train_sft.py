"""`chatserve train sft`: what is learnt, what is refused, and that the server computes the same."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.cli.commands import train
from chatserve.errors import CannotWrite, ModelLoadError, TrainingDiverged, UsageError
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.loader import load_model
from chatserve.models.merge import merge
from chatserve.train import supervised
from chatserve.train.recipe import SftRecipe
from chatserve.train.run_folder import RunFolder
from chatserve.train.run_options import RunOptions
from chatserve.train.training_log import read_log
from tests import networks, tiny, trainings, weights

FLAGS = [
    "--device", "cpu", "--max-length", "64", "--warmup-steps", "0", "--learning-rate", "0.01",
    "--batch-size", "2", "--max-steps", "8", "--save-steps", "4",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    trainings.save_base(folder / "base")
    trainings.save_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        # no address is looked up and nothing is connected to, whatever the libraries would like
        patch.setattr(socket, "getaddrinfo", _refuse)
        patch.setattr(socket.socket, "connect", _refuse)
        train_sft(folder, "run")
    return folder / "run"


def _refuse(*ignored: Any, **others: Any) -> None:
    raise AssertionError("the network was asked")


def train_sft(folder: Path, out: str, *flags: str) -> None:
    places = ["--data", str(folder / "data"), "--out", str(folder / out)]
    assert train.main(["sft", str(folder / "base"), *places, *FLAGS, *flags]) == 0


def test_the_loss_falls_and_the_adapter_is_where_it_is_printed(
    run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = [row["loss"] for row in read_log(run / "log.jsonl") if "loss" in row]
    assert len(losses) == 8 and losses[-1] < 0.8 * losses[0]
    capsys.readouterr()
    train_sft(folder, "run")  # over already: it says so again and trains nothing
    out, err = capsys.readouterr()
    assert out == f"{run}/adapter\n" and "8 steps: loss" in err
    assert len([row for row in read_log(run / "log.jsonl") if "loss" in row]) == 8
    config = json.loads((run / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.05)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "base"


def test_the_serving_network_gives_pefts_logits(run: Path, folder: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    ids = [3, 17, 64, 5, 99, 200]
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        plain = base(input_ids=torch.tensor([ids])).logits[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers has renamed what peft calls
        model = peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    checkpoint = merge(open_checkpoint(folder / "base"), [run / "adapter"])
    with closing(checkpoint.weights):
        network = load_model(checkpoint, choose_policy("cpu", dtype="float32"))
    assert (networks.logits(network, ids) - expected).abs().max() < 1e-3
    assert (plain - expected).abs().max() > 0.1  # and it has learnt something


def test_other_settings_are_refused_and_shown(run: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"recipe\.lora_rank was 16 and is 4"):
        train_sft(folder, "run", "--lora-rank", "4")
    trainings.save_data(folder / "other", 30)
    with pytest.raises(UsageError, match=r'data was "d_.* and is "d_'):
        train_sft(folder, "run", "--data", str(folder / "other"))


def test_a_diverged_training_stops_and_keeps_the_last_good_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = supervised._Trainer.compute_loss

    def diverging(self: Any, *inputs: Any, **others: Any) -> Any:
        loss = compute(self, *inputs, **others)
        return loss * math.nan if self.state.global_step == 5 else loss

    monkeypatch.setattr(supervised._Trainer, "compute_loss", diverging)
    with pytest.raises(TrainingDiverged, match=r"loss is nan at step 6.*checkpoint-4"):
        train_sft(folder, "diverged")
    run = RunFolder(folder / "diverged")
    assert [each.name for each in run.checkpoints()] == ["checkpoint-4"]
    assert not run.adapter.exists()


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", _no_space)
        with pytest.raises(CannotWrite, match="free some space"):
            train_sft(folder, "full")
    train_sft(folder, "full")
    assert (folder / "full" / "log.jsonl").read_bytes() == (run / "log.jsonl").read_bytes()


def _no_space(*ignored: Any, **others: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_adapter_of_another_base_is_refused(folder: Path, run: Path) -> None:
    tiny.save_model(folder / "stranger", seed=1)
    flags = ["--device", "cpu", "--data", str(folder / "data"), "--out", str(folder / "none")]
    adapter = ["--adapter", str(run / "adapter")]
    with pytest.raises(ModelLoadError, match="use it with its own base"):
        train.main(["sft", str(folder / "stranger"), *flags, *adapter])
    assert not (folder / "none").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "wants --data DIR"),
        (["--data", "nowhere", "--out", "x"], "no such folder"),
        (["--data", ".", "--out", "x"], "finetune"),
        (["--data", ".", "--out", "x", "--int8", "sometimes"], "invalid choice"),
    ],
)
def test_bad_input_is_one_line(folder: Path, flags: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        train.main(["sft", str(folder / "base"), *flags])


def test_the_recipe_is_printed_with_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["sft", "--print-recipe", "--max-steps", "7"]) == 0
    out = capsys.readouterr().out
    assert "lora_rank = 16" in out and "# supervised_finetuning.py, 2023" in out
    assert next(line for line in out.splitlines() if "max_steps" in line).endswith("set by you")


def test_the_default_model_trains_from_its_gguf_file(tmp_path: Path) -> None:
    """One step of SmolLM2 on the CPU: dequantised, its ids the server's."""
    trainings.save_data(tmp_path / "data", 4)
    recipe = SftRecipe(max_steps=1, batch_size=1, max_length=16, num_eval_rows=0)
    outcome = supervised.train_sft(
        weights.default_model(), tmp_path / "data", RunFolder(tmp_path / "run"), recipe,
        RunOptions(device="cpu"), lambda *told: None,
    )  # fmt: skip
    assert outcome.steps == 1 and outcome.figures["loss"] < 8
