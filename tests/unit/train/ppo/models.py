"""A tiny policy whose adapter already does something."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from chatserve.train.ppo.policy import ADAPTER, Policy
from tests.tiny import build_hf_model

MODULES = ["q_proj", "v_proj", "up_proj", "down_proj"]


def build_policy(**changes: Any) -> Policy:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        # PEFT 0.21 reads a property that transformers 5.23 has renamed
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(
            build_hf_model(**changes),
            LoraConfig(r=4, lora_alpha=8, target_modules=MODULES, task_type="CAUSAL_LM"),
            adapter_name=ADAPTER,
        )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    policy = Policy(model)
    with torch.no_grad():
        policy.value_head.summary.weight.normal_(0, 0.1)
    return policy.eval()
