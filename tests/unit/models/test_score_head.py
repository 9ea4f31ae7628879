"""A reward adapter's score head: read as PEFT writes it, refused where it cannot score."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.errors import ModelLoadError
from chatserve.models.adapter import load_adapter
from chatserve.models.config import ModelConfig
from chatserve.models.score_head import (
    SCORE_KEY,
    TRAINING_RECORD,
    has_score_head,
    load_reward_adapter,
    load_score_head,
)
from tests import adapters, tiny

CONFIG = ModelConfig.from_hf({"architectures": ["LlamaForCausalLM"], **tiny.sizes()})
REWARD = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}


def write(folder: Path, key: str = SCORE_KEY, head: Any = None, **config: Any) -> Path:
    tensors = adapters.random_pairs(adapters.tiny_shapes())
    tensors[key] = torch.arange(64.0)[None] / 64 if head is None else head
    return adapters.write(folder, tensors, **{**REWARD, **config})


@pytest.mark.parametrize(
    "key", [SCORE_KEY, "score.weight", "base_model.model.score.modules_to_save.default.weight"]
)
def test_the_head_is_read_from_the_adapters_file(tmp_path: Path, key: str) -> None:
    folder = write(tmp_path / "rm", key)
    adapter, head = load_reward_adapter(folder, CONFIG, name="rm")
    assert adapter.name == "rm" and len(adapter.pairs) == 4 and has_score_head(folder)
    assert head.weight.equal(torch.arange(64.0) / 64)
    assert head.template is head.base_fingerprint is None
    hidden = torch.ones(2, 3, 64, dtype=torch.bfloat16)
    assert head.score(hidden).shape == (2, 3) and head.score(hidden)[0, 0] == 31.5


def test_the_record_tells_template_and_base(tmp_path: Path) -> None:
    folder = write(tmp_path / "rm")
    record = {"template": "Q {question} {answer}", "base_fingerprint": "w_1"}
    (folder / TRAINING_RECORD).write_text(json.dumps(record), "utf-8")
    head = load_score_head(folder, CONFIG)
    assert (head.template, head.base_fingerprint) == ("Q {question} {answer}", "w_1")


def test_peft_saves_what_is_read_here(tmp_path: Path) -> None:
    import peft
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model("llama", **tiny.sizes(num_labels=1))
    model = AutoModelForSequenceClassification.from_config(config)
    model.config.pad_token_id = 0
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():
        # transformers has renamed what peft calls, and the base has no folder with a vocabulary
        warnings.simplefilter("ignore")
        trained = peft.get_peft_model(model, lora)
        trained.save_pretrained(tmp_path / "rm")
    adapter, head = load_reward_adapter(tmp_path / "rm", CONFIG)
    assert len(adapter.pairs) == 4
    theirs = trained.base_model.model.score.modules_to_save["default"].weight
    assert head.weight.equal(theirs[0].detach())


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"key": "base_model.model.v_head.weight"}, "has no score head"),
        ({"head": torch.ones(2, 64)}, "several labels"),
        ({"head": torch.ones(1, 65)}, "another base"),
        ({"head": torch.ones(1, 64, dtype=torch.int64)}, "int64"),
        ({"head": torch.full((1, 64), float("nan"))}, "no numbers"),
        ({"task_type": "CAUSAL_LM"}, "a reward model's is 'SEQ_CLS'"),
        ({"modules_to_save": ["score", "lm_head"]}, "modules_to_save"),
        ({"key": "base_model.model.lm_head.weight"}, "no part of a LoRA pair"),
    ],
)
def test_what_cannot_score_is_refused(tmp_path: Path, tensors: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        load_reward_adapter(write(tmp_path / "rm", **tensors), CONFIG)


def test_a_reward_adapter_writes_no_text(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="a reward model"):
        load_adapter(write(tmp_path / "rm"), CONFIG)
    folder = write(tmp_path / "text", task_type="CAUSAL_LM", modules_to_save=None)
    with pytest.raises(ModelLoadError, match="no part of a LoRA pair"):
        load_adapter(folder, CONFIG)
