"""What headers say of weights on disk, and a name for their content."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatserve.errors import ModelLoadError
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.fingerprint import _sampled_rows, weights_fingerprint
from chatserve.models.receipt import write_receipt
from chatserve.models.weights import TensorInfo
from chatserve.models.weights_summary import summarise
from tests import receipts, tiny
from tests.unit.models.vocabularies import smollm2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.save_model(path, dtype=torch.bfloat16, tokenizer=False)
    return path


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def change(folder: Path, name: str, value: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: value}, file, metadata={"format": "pt"})


def fingerprint(folder: Path) -> str:
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        return weights_fingerprint(checkpoint)


def test_a_folder(folder: Path) -> None:
    found = summarise(folder)
    tensors = load_file(folder / "model.safetensors")
    assert found.architecture == "LlamaForCausalLM"
    assert found.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert (found.dtype, found.dtypes) == ("bfloat16", {"bfloat16": 2 * found.num_parameters})
    assert found.fingerprint == fingerprint(folder)
    assert found.receipt is None


def test_a_config_that_names_no_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
    assert summarise(folder).architecture == "llama"


def test_the_largest_share_is_the_dtype(folder: Path) -> None:
    change(folder, "model.norm.weight", torch.ones(64))
    assert list(summarise(folder).dtypes) == ["bfloat16", "float32"]


def test_its_receipt(folder: Path) -> None:
    receipt = receipts.receipt(fingerprint(folder))
    write_receipt(folder, receipt, "<svg/>")
    assert summarise(folder).receipt == receipt


def test_damaged_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ModelLoadError):
        summarise(folder)


def test_the_fingerprint_is_the_content_s(folder: Path, source: Path) -> None:
    assert fingerprint(folder) == fingerprint(source)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    changed = fingerprint(folder)
    assert changed != fingerprint(source)
    change(folder, "model.norm.weight", torch.ones(64, dtype=torch.bfloat16))
    assert fingerprint(folder) != changed


MATRICES = ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"]


@pytest.mark.parametrize("name", MATRICES)
def test_another_training_has_another_fingerprint_and_no_receipt(
    folder: Path, source: Path, name: str
) -> None:
    """Of the same shape, with the same vectors: one matrix of it differs, as every one would."""
    write_receipt(folder, receipts.receipt(fingerprint(folder)), "<svg/>")
    assert summarise(folder).receipt is not None
    tensors = load_file(folder / "model.safetensors")
    change(folder, name, tensors[name] + 0.25)
    assert fingerprint(folder) != fingerprint(source)
    assert summarise(folder).receipt is None


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((100, 8), [0, 33, 66, 99]),
        ((3, 8), [0, 1, 2]),
        ((1, 8), [0]),
        ((4, 1 << 10, 1 << 10), [0]),  # experts of one tensor: no more than one is read
        ((8,), []),
        ((), []),
        ((0, 8), []),
        ((8, 0), []),
    ],
)
def test_a_few_rows_are_read(shape: tuple[int, ...], rows: list[int]) -> None:
    info = TensorInfo("w", shape, "float16", 2 * math.prod(shape))
    assert list(_sampled_rows(info)) == rows


@pytest.mark.weights
def test_gguf() -> None:
    found = summarise(smollm2())
    assert found.architecture == "LlamaForCausalLM"
    assert found.dtype == "Q4_1" and {"Q8_0", "F32"} < found.dtypes.keys()
    assert sum(found.dtypes.values()) < smollm2().stat().st_size
