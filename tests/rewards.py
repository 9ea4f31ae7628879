"""Reward models beside the tiny base: random adapters with a score head, and PEFT's numbers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from chatserve.models.score_head import SCORE_KEY, TRAINING_RECORD
from tests import adapters, tiny

CONFIG: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}


def write(folder: Path, *, seed: int = 0, record: Any = None, **config: Any) -> Path:
    """A random reward adapter of the tiny model."""
    tensors = adapters.random_pairs(adapters.tiny_shapes(), seed=seed)
    tensors[SCORE_KEY] = head(seed)
    adapters.write(folder, tensors, **{**CONFIG, **config})
    if record is not None:
        (folder / TRAINING_RECORD).write_text(json.dumps(record), "utf-8")
    return folder


def head(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)) * 0.1


def by_peft(base: Path, adapter: Path, texts: Sequence[str], *, ends: bool = False) -> list[float]:
    """What transformers' classifier with PEFT's adapter says of whole texts in float32."""
    import peft
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    # one text at a time: no padding can be mistaken for its last token
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a base that lacks a head of that kind
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, dtype=torch.float32
        )
        rated = peft.PeftModel.from_pretrained(model, adapter).eval()
    scores = []
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text)["input_ids"] + [tiny.EOS_ID] * ends
            scores.append(float(rated(torch.tensor([ids])).logits[0, 0]))
    return scores
