"""The base for training: the weights and the ids that serving has, from every kind of file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from chatserve.errors import ModelLoadError, UsageError
from chatserve.models.tokenizer import load_tokenizer
from chatserve.train.base import identify_base, open_base, score_model
from chatserve.train.int8_base import pack_linears
from chatserve.train.offline import no_network
from tests import adapters, tiny

IDS = torch.tensor([[1, 2, 3, 70]])


def folder(path: Path, **changes: Any) -> tuple[Path, Any]:
    path.mkdir()
    return path, tiny.save_model(path, **changes)


@pytest.mark.parametrize("tied", [False, True])
def test_a_folders_network_is_transformers_own(tmp_path: Path, tied: bool) -> None:
    path, model = folder(tmp_path / "base", tie_word_embeddings=tied)
    with no_network():
        base = open_base(path, device="cpu")
    assert base.model(input_ids=IDS).logits.equal(model(input_ids=IDS).logits)
    assert not any(each.requires_grad for each in base.model.parameters())
    assert base.name == "base" and base.fingerprint == identify_base(path).fingerprint


def test_ids_are_those_that_serving_reads(tmp_path: Path) -> None:
    path, _ = folder(tmp_path / "base")
    served = load_tokenizer(path)
    with no_network():
        processing = open_base(path, device="cpu").processing
    text = "Question: naïve <|im_end|> 🎉?\n\nAnswer: no"
    ids = served.encode(text, add_bos=served.adds_bos)
    assert processing.encode_text(text) == ids
    assert processing.encode_text(text, ends=True) == [*ids, tiny.EOS_ID]
    assert processing(text.replace("<|im_end|>", ""))["input_ids"] == served.encode(
        text.replace("<|im_end|>", ""), add_bos=served.adds_bos
    )
    assert processing.decode([*ids, tiny.EOS_ID], skip_special_tokens=True) == text
    assert processing.eos_token_id == tiny.EOS_ID != processing.pad_token_id


def test_merged_adapters_are_in_the_base_and_in_its_fingerprint(tmp_path: Path) -> None:
    path, _ = folder(tmp_path / "base")
    sft = adapters.write(tmp_path / "sft")
    with no_network():
        plain = open_base(path, device="cpu")
        merged = open_base(path, device="cpu", adapters=[sft])
    assert plain.fingerprint != merged.fingerprint
    assert not plain.model(input_ids=IDS).logits.allclose(merged.model(input_ids=IDS).logits)


def test_a_score_head_begins_the_same_everywhere(tmp_path: Path) -> None:
    path, _ = folder(tmp_path / "base")
    with no_network():
        text = open_base(path, device="cpu")
        score = open_base(path, device="cpu", head="score", seed=3)
        shared = score_model(text, seed=3)
    assert shared.base_model is text.model.base_model
    expected = score.model(input_ids=IDS).logits
    assert expected.shape == (1, 1) and shared(input_ids=IDS).logits.equal(expected)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    path, _ = folder(tmp_path / "gpt2", model_type="gpt2", n_layer=2, n_head=4, n_embd=64)
    with no_network(), pytest.raises(ModelLoadError, match="Llama family"):
        open_base(path, device="cpu")
    with pytest.raises(UsageError, match="bitsandbytes trains on CUDA"):
        open_base(path, device="cpu", int8=True)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no such device"):
            open_base(path, device="cuda")


def test_the_network_is_forbidden_and_allowed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with no_network():
        assert os.environ["HF_HUB_OFFLINE"] == "1" and constants.is_offline_mode()
        assert constants.HF_HUB_DISABLE_TELEMETRY
    assert os.environ["HF_HUB_OFFLINE"] == "0" and not constants.is_offline_mode()


def test_int8_packs_the_blocks_and_keeps_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Packed(nn.Linear):
        def __init__(self, rows: int, columns: int, bias: bool, has_fp16_weights: bool) -> None:
            super().__init__(rows, columns, bias=bias)
            assert not has_fp16_weights

    def parameter(data: torch.Tensor, **flags: bool) -> nn.Parameter:
        assert flags == {"requires_grad": False, "has_fp16_weights": False}
        return nn.Parameter(data, requires_grad=False)

    fake = SimpleNamespace(nn=SimpleNamespace(Linear8bitLt=Packed, Int8Params=parameter))
    model = tiny.build_hf_model()
    expected = model(input_ids=IDS).logits
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        pack_linears(model)
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    assert pack_linears(model) == 2 * 7 and model.is_loaded_in_8bit
    assert isinstance(model.model.layers[1].mlp.down_proj, Packed)
    assert type(model.lm_head) is nn.Linear
    assert model(input_ids=IDS).logits.equal(expected)
