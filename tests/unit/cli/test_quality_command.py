"""`chatserve quality`: figures on stdout, a receipt beside the weights, errors in one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from chatserve.cli.commands.quality import main
from chatserve.cli.main import main as chatserve
from chatserve.config import WorkerConfig
from chatserve.engine import serving
from chatserve.models.receipt import PLOT_NAME, RECEIPT_NAME, Receipt, receipt_of
from chatserve.quality import measure
from tests import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.save_model(path, dtype=torch.bfloat16)
    return path


@pytest.fixture
def folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    return Path(shutil.copytree(source, tmp_path / "tiny"))


def run(folder: Path, *flags: str) -> int:
    return main([str(folder), "--tokens", "300", "--device", "cpu", *flags])


def kept(folder: Path) -> Receipt:
    receipt = receipt_of(json.loads((folder / RECEIPT_NAME).read_text()))
    assert receipt is not None
    return receipt


def names(folder: Path) -> list[str]:
    return [each.form.name for each in kept(folder).measurements]


def test_two_forms_in_one_go(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--load-8bit", "--load-4bit") == 0
    out, err = capsys.readouterr()
    head, columns, int8, int4, reference, worst, _ = out.splitlines()
    assert head.startswith("tiny against float32") and head.endswith("more were not read)")
    assert "300 tokens of shipped text" in head
    assert columns.split()[:2] == ["form", "mean"]
    eight, four = kept(folder).measurements
    assert int8.split()[:3] == ["int8", f"{eight.mean_kl:.4f}", f"{eight.p99_kl:.4f}"]
    assert int4.startswith("int4/32+min/8") and f"{four.perplexity:.3f}" in int4
    assert reference.split() == ["reference", f"{kept(folder).reference_perplexity:.3f}"]
    assert worst.startswith(
        f"worst layers of int8, by error in what they add: {eight.worst_layers[0].layer} "
    )
    assert 0 < eight.mean_kl < four.mean_kl
    assert str(folder / RECEIPT_NAME) in err and err.startswith("measuring tiny")
    ElementTree.parse(folder / PLOT_NAME)


def test_json_is_the_receipt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--load-8bit", "--quant-group", "32", "--json") == 0
    table: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert receipt_of(table) == kept(folder)
    assert table["measured"] == ["int8/32 a16"] and table["folder"] == str(folder)


def test_a_later_form_joins_the_others(folder: Path) -> None:
    run(folder, "--load-8bit")
    run(folder, "--load-4bit")
    assert names(folder) == ["int8", "int4/32+min/8"]
    run(folder, "--load-8bit", "--tokens", "200")  # another text: nothing can be compared
    assert names(folder) == ["int8"]


def test_without_flags_the_form_that_is_served_without_them(folder: Path) -> None:
    assert run(folder, "--dtype", "bfloat16") == 0
    (found,) = kept(folder).measurements
    assert found.form.name == "bfloat16" and 0 < found.mean_kl < 0.1


def test_own_text(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("The five boxing wizards jump quickly. " * 8)
    assert run(folder, "--load-8bit", "--text", str(file)) == 0
    assert (kept(folder).text.name, kept(folder).text.num_positions) == ("own.txt", 300)


def test_the_worker_shows_what_was_measured(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(folder, "--load-8bit")

    def quality(**form: Any) -> Any:
        _, served = serving.load(WorkerConfig(weights=str(folder), device="cpu", **form))
        return served.description["quality"]

    with caplog.at_level("INFO", "chatserve.engine.serving"):
        shown = quality(load_8bit=True)
    (found,) = kept(folder).measurements
    assert shown == {
        "form": "int8",
        "mean_kl": found.mean_kl,
        "p99_kl": found.p99_kl,
        "top1_agreement": found.top1_agreement,
        "perplexity": found.perplexity,
        "reference_perplexity": kept(folder).reference_perplexity,
        "text": "shipped",
        "num_positions": 300,
        "measured_at": kept(folder).measured_at,
    }
    assert f"quality of {found.summary()}" in caplog.messages
    assert quality(load_4bit=True) is None
    table = json.loads((folder / RECEIPT_NAME).read_text())
    (folder / RECEIPT_NAME).write_text(json.dumps({**table, "version": "0.0.0"}))
    assert quality(load_8bit=True) is None


def test_an_interrupted_run_leaves_the_old_receipt(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, "--load-8bit")
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "run_layer", interrupted)
    code = chatserve(["quality", str(folder), "--load-4bit", "--tokens", "300"])
    assert code == 130
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quant-group", "32"], "--quant-group is a finer form of --load-8bit"),
        (["--load-8bit", "--tokens", "5"], "from 128 to 65536"),
        (["--load-8bit", "--text", "nowhere.txt"], "--text nowhere.txt: No such file"),
        (["--load-3bit"], "unknown flag --load-3bit"),
    ],
)
def test_wrong_flags(
    folder: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chatserve(["quality", str(folder), *flags]) == 2
    err = capsys.readouterr().err
    assert message in err.replace("\n", " ") and "Traceback" not in err
    assert not (folder / RECEIPT_NAME).exists()


def test_weights_that_cannot_be_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chatserve(["quality", str(tmp_path / "absent")]) == 3
    (folder / "model.safetensors").write_bytes(b"half")
    assert chatserve(["quality", str(folder), "--load-8bit"]) == 3
    tiny.save_model(tmp_path / "neox", "gpt_neox")
    assert chatserve(["quality", str(tmp_path / "neox"), "--load-8bit"]) == 3
    assert "needs a network of the Llama family" in capsys.readouterr().err


def test_a_tensor_that_is_missing_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert chatserve(["quality", str(folder), "--load-8bit"]) == 3
    assert "model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err
