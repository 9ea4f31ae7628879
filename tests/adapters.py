"""LoRA adapters on disk: as PEFT and TRL wrote them in 2023, by hand, and as PEFT does now."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# trl-lib/llama-7b-se-rl-peft of 2023, with keys that nobody writes any more
CONFIG_2023: dict[str, Any] = {
    "base_model_name_or_path": None,
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}


def pair_names(module: str) -> tuple[str, str]:
    """The names of lora_A and lora_B in PEFT's files."""
    stem = f"base_model.model.{module}.lora_"
    return f"{stem}A.weight", f"{stem}B.weight"


def random_pairs(
    shapes: Mapping[str, tuple[int, int]], *, rank: int = 4, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random tensors of an adapter's file; `shapes`: (out, in) by module."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in shapes.items():
        name_a, name_b = pair_names(module)
        tensors[name_a] = torch.randn(rank, columns, generator=generator) * 0.1
        tensors[name_b] = torch.randn(rows, rank, generator=generator) * 0.1
    return tensors


def tiny_shapes(targets: Iterable[str] = ("q_proj", "v_proj")) -> dict[str, tuple[int, int]]:
    """Matrices of `tiny.sizes()` by module."""
    blocks = {
        "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64),
        "mlp.down_proj": (64, 96),
    }  # fmt: skip
    return {
        f"model.layers.{layer}.{module}": shape
        for layer in (0, 1)
        for module, shape in blocks.items()
        if module.endswith(tuple(targets))
    }


def write(
    folder: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    *,
    as_bin: bool = False,
    **config: Any,
) -> Path:
    """An adapter for the tiny model; `config` changes adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG_2023, **config}), "utf-8")
    tensors = random_pairs(tiny_shapes()) if tensors is None else dict(tensors)
    if as_bin:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def peft_model(base: Any, *, seed: int = 0, **config: Any) -> Any:
    """`base` with a random adapter of PEFT's own, in place."""
    import peft

    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 in a deprecated way
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight) * 0.1)
    return model


def save_peft(model: Any, folder: Path) -> None:
    """As training does; without asking the hub whether the base's vocabulary is another one."""
    model.save_pretrained(folder, save_embedding_layers=False)
