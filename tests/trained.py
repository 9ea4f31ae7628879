"""A tiny Llama that has learnt one text by heart, so that a spoilt conversion of it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from chatserve.models import reading
from chatserve.models.tokenizer import load_tokenizer
from tests import tiny

_STEPS = 60


def save_trained(folder: Path, **changes: Any) -> Path:
    """Train and save; a second or two."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.save_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([reading.token_ids(tokenizer, reading.PROSE, reading.MAX_TOKENS)])
    model = tiny.build_hf_model(**changes)
    _lengthen_slow_rows(model)
    optimiser = torch.optim.Adam(model.parameters(), lr=8e-3)
    for _ in range(_STEPS):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    return folder


def _lengthen_slow_rows(model: Any) -> None:
    """What long training does to query and key rows, short training leaves as it is."""
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    profile = torch.linspace(-1, 1, head_dim // 2).exp().repeat(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight *= profile.repeat(weight.shape[0] // head_dim)[:, None]
