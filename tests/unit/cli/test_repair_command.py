"""`chatserve repair`: what is wrong, the folder put right, and what only other files can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatserve.cli.main import main
from chatserve.config import WorkerConfig
from chatserve.engine import serving
from tests import tiny
from tests.trained import save_trained
from tests.unit.models.vocabularies import save_llama

K0 = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_trained(tmp_path_factory.mktemp("trained") / "model")


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def to_neighbours(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Meta's order, row by row."""
    moved = torch.empty_like(rows)
    for row in range(rows.shape[0]):
        head, place = divmod(row, head_dim)
        half, pair = divmod(place, head_dim // 2)
        moved[head * head_dim + 2 * pair + half] = rows[row]
    return moved


def with_meta_rows(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = {
        name: to_neighbours(weight, 16) if "q_proj" in name or "k_proj" in name else weight
        for name, weight in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_rotary_rows_are_put_right_exactly(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_meta_rows(trained, tmp_path / "m")
    assert main(["repair", str(folder)]) == 0  # only says what is wrong
    told = capsys.readouterr()
    assert told.out == "" and f"chatserve repair {folder} TARGET" in told.err
    assert "pairs of neighbours, as in Meta's own files" in told.err
    assert main(["repair", str(folder), "right"]) == 0
    assert capsys.readouterr().out == "right\n"
    assert (tmp_path / "right" / "tokenizer.json").exists()
    right = load_file(tmp_path / "right" / "model.safetensors")
    wanted = load_file(trained / "model.safetensors")
    assert right.keys() == wanted.keys()
    assert all(right[name].equal(wanted[name]) for name in wanted)
    serving.load(WorkerConfig(weights="right", device="cpu", dtype="float32"))
    assert main(["repair", "right", "again"]) == 0
    assert "nothing to put right" in capsys.readouterr().err and not Path("again").exists()


def small_llama(folder: Path, rows: int, **config: Any) -> Path:
    """LLaMA's tokenizer and a very small network."""
    tiny.save_model(
        folder, dtype=torch.float16, tokenizer=False, vocab_size=rows, hidden_size=16,
        intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps({**read(path), **config}), "utf-8")
    return folder


def test_a_folder_as_decapodas_gets_the_vocabularys_names_and_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    folder = small_llama(tmp_path / "m", 32000, **ids)
    blanks = {"bos_token": "", "eos_token": "", "unk_token": "", "model_max_length": 7}
    save_llama(folder, tokenizer_config=blanks, special_tokens_map={}, generation_config=ids)
    assert main(["repair", str(folder), "right"]) == 0
    told = capsys.readouterr().err
    assert "eos_token was blank, the vocabulary says '</s>'" in told
    assert "config.json said bos_token_id 0, eos_token_id 1, pad_token_id -1" in told
    assert "hardly less than chance" in told  # random weights stay random
    right = tmp_path / "right"
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert read(right / "tokenizer_config.json") == {**blanks, **names}
    assert read(right / "special_tokens_map.json") == names
    for file in ("config.json", "generation_config.json"):
        table = read(right / file)
        assert (table["bos_token_id"], table["eos_token_id"], table["pad_token_id"]) == (1, 2, None)
    assert (right / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_a_name_that_is_null_is_no_fault(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen's tokenizer_config.json says so of BOS, and its config.json has an id all the same."""
    folder = tmp_path / "m"
    folder.mkdir()
    for file in trained.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**read(settings), "bos_token": None}), "utf-8")
    assert main(["repair", str(folder), "right"]) == 0
    assert "nothing to put right" in capsys.readouterr().err and not Path("right").exists()


def test_the_row_that_config_and_tokenizer_lack_is_added(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    folder = save_llama(small_llama(tmp_path / "vicuna", 32001, vocab_size=32000, **ids))
    assert main(["repair", str(folder), "vicuna-right"]) == 0
    told = capsys.readouterr().err
    assert "said 32,000 rows of vocabulary, there are 32,001" in told and "lacked [PAD]" in told
    assert read(tmp_path / "vicuna-right" / "added_tokens.json") == {"[PAD]": 32000}
    _, model = serving.load(WorkerConfig(weights="vicuna-right", device="cpu"))
    assert model.description["template"] == "vicuna_v0"


def test_what_cannot_be_put_right_is_said_and_nothing_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_model(tmp_path / "noise")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for arguments, code, words in (
        (["noise", "right"], 3, "nothing that can be put right explains it"),
        (["x.gguf", "right"], 2, "only model folders"),
        ([], 2, "usage"),
        (["a", "b", "c"], 2, "usage"),
        ([str(with_meta_rows(trained, tmp_path / "m")), "noise"], 2, "--force"),
    ):
        assert main(["repair", *arguments]) == code, arguments
        told = capsys.readouterr()
        assert words in told.err and told.out == ""
    assert not Path("right").exists()
    assert main(["repair", "m", "noise", "--force"]) == 0
    assert load_file("noise/model.safetensors")[K0].shape == (32, 64)
