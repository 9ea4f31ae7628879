"""`chatserve merge-adapter`: a folder that serves like base and adapters; spellings, exit codes."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chatserve.cli.main import main
from chatserve.models import merged_folder
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.loader import load_model
from chatserve.models.merge import merge
from chatserve.models.safetensors_writer import FolderWriter
from tests import adapters, networks, tiny

SFT, RL = (adapters.random_pairs(adapters.tiny_shapes(), seed=seed) for seed in (1, 2))
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`base` in half precision, `sft` and `rl`, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("CHATSERVE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    tiny.save_model(tmp_path / "base", dtype=torch.float16)
    (tmp_path / "base" / "LICENSE").write_text("do not redistribute", "utf-8")
    (tmp_path / "base" / "optimizer.pt").write_bytes(b"x")
    adapters.write(tmp_path / "sft", SFT, base_model_name_or_path="org/base")
    adapters.write(tmp_path / "rl", RL, base_model_name_or_path="trl-lib/llama-se-merged")


def tensors(folder: str) -> dict[str, torch.Tensor]:
    return {k: v for file in Path(folder).glob("*.safetensors") for k, v in load_file(file).items()}


def expected(*pairs: dict[str, torch.Tensor]) -> torch.Tensor:
    name_a, name_b = adapters.pair_names(Q0)
    weight = tensors("base")[f"{Q0}.weight"].float()
    for pair in pairs:
        weight = weight + 2 * pair[name_b] @ pair[name_a]
    return weight


def is_merge(folder: str, *pairs: dict[str, torch.Tensor]) -> bool:
    return torch.allclose(tensors(folder)[f"{Q0}.weight"].float(), expected(*pairs), atol=1e-3)


@torch.no_grad()
def logits(folder: str, *paths: str) -> torch.Tensor:
    checkpoint = merge(open_checkpoint(Path(folder)), [Path(path) for path in paths])
    policy = choose_policy("cpu", "float16", load_8bit=False)
    with closing(checkpoint.weights):
        return networks.logits(load_model(checkpoint, policy), range(5, 45))


@pytest.mark.parametrize(
    "arguments",
    [
        "base sft out",
        "--offline base sft --force out",
        "--base-model-path base --lora-path sft --target-model-path out",
        "base --lora-path=sft out",
        "sft --base base --target out",
    ],
)
def test_every_spelling_writes_the_merge(
    arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge-adapter", *arguments.split()]) == 0
    streams = capsys.readouterr()
    assert streams.out == "out\n"
    assert "merging into out" in streams.err and "chatserve chat out" in streams.err
    assert is_merge("out", SFT)


def test_the_folder_is_whole_and_nothing_else(tmp_path: Path) -> None:
    assert main(["merge-adapter", "base", "sft", "rl", "out"]) == 0
    assert {path.name for path in Path("out").iterdir()} == {
        "config.json", "generation_config.json", "LICENSE", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    merged, base = tensors("out"), tensors("base")
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float16
        assert tensor.equal(base[name]) == ("q_proj" not in name and "v_proj" not in name)
    config = json.loads(Path("out/config.json").read_text("utf-8"))
    before = json.loads(Path("base/config.json").read_text("utf-8"))
    records = config.pop("merged_adapters")
    assert config == before
    assert [(each["name"], each["base"]) for each in records] == [
        ("sft", "org/base"), ("rl", "trl-lib/llama-se-merged"),
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "rl", "sft"]


def test_both_stages_at_once_or_one_by_one_or_while_loading() -> None:
    assert main(["merge-adapter", "base", "sft", "rl", "both"]) == 0
    assert main(["merge-adapter", "base", "sft", "first"]) == 0
    assert main(["merge-adapter", "first", "rl", "second"]) == 0
    assert is_merge("both", SFT, RL) and is_merge("second", SFT, RL)
    # to the bit: both are rounded to half precision once
    assert logits("both").equal(logits("base", "sft", "rl"))


def test_the_dtype_can_be_chosen() -> None:
    assert main(["merge-adapter", "base", "sft", "out", "--dtype", "float32"]) == 0
    assert {tensor.dtype for tensor in tensors("out").values()} == {torch.float32}
    assert torch.allclose(tensors("out")[f"{Q0}.weight"], expected(SFT), rtol=0, atol=1e-6)
    assert json.loads(Path("out/config.json").read_text("utf-8"))["dtype"] == "float32"


def test_transformers_reads_the_folder() -> None:
    from transformers import AutoModelForCausalLM

    assert main(["merge-adapter", "base", "sft", "out"]) == 0
    model = AutoModelForCausalLM.from_pretrained("out")
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.equal(tensors("out")[f"{Q0}.weight"])


def test_rows_are_written_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["merge-adapter", "base", "sft", "whole"]) == 0
    monkeypatch.setattr(merged_folder, "_SLICE_VALUES", 5 * 64)
    assert main(["merge-adapter", "base", "sft", "sliced"]) == 0
    whole, sliced = tensors("whole"), tensors("sliced")
    assert all(sliced[name].equal(whole[name]) for name in whole)


def test_rotary_tables_stay_behind_and_other_vectors_come_along() -> None:
    from safetensors.torch import save_file

    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.bias": torch.tensor(1),
    }
    save_file({**tensors("base"), **more}, "base/model.safetensors")
    assert main(["merge-adapter", "base", "sft", "out"]) == 0
    assert tensors("out").keys() == tensors("base").keys() - {next(iter(more))}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("base sft", 2, "usage: chatserve merge-adapter"),
        ("", 2, "usage: chatserve merge-adapter"),
        ("--base-model-path base out", 2, "usage: chatserve merge-adapter"),
        ("--base-model-path base --lora-path sft", 2, "usage: chatserve merge-adapter"),
        ("base sft out --dtype int4", 2, "int4"),
        ("base sft sft", 2, "which is read"),
        ("base sft base", 2, "which is read"),
        ("base sft base --force", 2, "which is read"),
        ("none/ sft out", 3, "none: no such folder"),
        ("base none out", 3, "none: no such folder"),
        ("base base out", 3, "chatserve serve base"),
        ("sft base out", 3, "chatserve serve org/base --adapter sft"),
        ("base sft sft out", 3, "must not be added twice"),
    ],
)
def test_what_is_refused(
    arguments: str, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge-adapter", *arguments.split()]) == code
    streams = capsys.readouterr()
    assert streams.out == "" and words in streams.err.splitlines()[-1]
    assert not list(Path().glob("out*"))


def test_an_existing_target_stays_unless_forced() -> None:
    assert main(["merge-adapter", "base", "sft", "out"]) == 0
    assert main(["merge-adapter", "base", "rl", "out"]) == 2
    assert is_merge("out", SFT)
    assert main(["merge-adapter", "base", "rl", "out", "--force"]) == 0
    assert is_merge("out", RL)


@pytest.mark.parametrize("stage", ["write", "copy_file", "write_json", "finish"])
def test_a_failure_leaves_the_old_target(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["merge-adapter", "base", "sft", "out"]) == 0

    def fail(*_: object) -> None:
        raise OSError("no more")

    monkeypatch.setattr(FolderWriter, stage, fail)
    assert main(["merge-adapter", "base", "rl", "out", "--force"]) == 1
    assert is_merge("out", SFT)
    assert not list(Path().glob("*.partial-*"))


def test_a_gguf_base_is_served_instead(capsys: pytest.CaptureFixture[str]) -> None:
    Path("base.gguf").write_bytes(b"GGUF")
    assert main(["merge-adapter", "base.gguf", "sft", "rl", "out"]) == 2
    assert "chatserve serve base.gguf --adapter sft --adapter rl" in capsys.readouterr().err
