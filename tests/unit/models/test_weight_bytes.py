"""Bytes of a network's weights as they lie in memory."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.llama_kernels import KernelLlama
from chatserve.models.loader import load_model
from chatserve.models.weight_bytes import weight_bytes
from tests import tiny

ROWS = tiny.VOCAB_SIZE * 64


def loaded(
    folder: Path, model_type: str = "llama", *, load_8bit: bool = False, **changes: Any
) -> Any:
    """The network and how many values the transformers model holds, tied ones once."""
    hf_model = tiny.save_model(folder, model_type, tokenizer=False, **changes)
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        model = load_model(checkpoint, choose_policy("cpu", "float32", load_8bit=load_8bit))
    return model, sum(weight.numel() for weight in hf_model.parameters())


@pytest.mark.parametrize("is_tied", [False, True])
def test_plain_weights(tmp_path: Path, is_tied: bool) -> None:
    model, num_values = loaded(tmp_path / "m", tie_word_embeddings=is_tied)
    found = weight_bytes(model)
    assert found.by_device == {"cpu": 4 * num_values} and found.total == 4 * num_values
    # a token looks one row up in an embedding that is not the head
    assert found.read_per_token == 4 * (num_values - (0 if is_tied else ROWS))


@pytest.mark.parametrize("is_tied", [False, True])
def test_packed_weights(tmp_path: Path, is_tied: bool) -> None:
    model, num_values = loaded(tmp_path / "m", load_8bit=True, tie_word_embeddings=is_tied)
    assert isinstance(model, KernelLlama)
    found = weight_bytes(model)
    table = 0 if is_tied else 4 * ROWS
    vectors = 4 * 5 * 64  # norms, padded to whole panels already
    assert found.by_device == {"cpu": model.num_bytes + table + vectors}
    assert found.read_per_token == model.num_bytes + vectors
    assert found.total < 4 * num_values


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_model_of_transformers(tmp_path: Path, is_tied: bool) -> None:
    model, num_values = loaded(tmp_path / "m", "gpt_neox", tie_word_embeddings=is_tied)
    found = weight_bytes(model)
    # beside the weights a few tables of positions
    assert 4 * num_values <= found.total < 4.1 * num_values
    assert found.read_per_token == found.total


def test_each_device_has_its_own_sum(tmp_path: Path) -> None:
    model, num_values = loaded(tmp_path / "m", tie_word_embeddings=True)
    model.norm.scale.weight = torch.empty(64, device="meta")
    assert weight_bytes(model).by_device == {"cpu": 4 * (num_values - 64), "meta": 4 * 64}
