"""Small bases and deltas on disk, in the layouts in which LLaMA and Vicuna were published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCAB, HIDDEN, FFN, LAYERS = 32, 16, 24, 2
EXTENDED = ("model.embed_tokens.weight", "lm_head.weight")
Tensors = dict[str, torch.Tensor]


def config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "rms_norm_eps": 1e-6, "torch_dtype": "float16",
        "tie_word_embeddings": False, "max_position_embeddings": 64, **changes,
    }  # fmt: skip


def shapes(*, vocab: int = VOCAB, hidden: int = HIDDEN, layers: int = LAYERS) -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in "qkvo":
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (FFN, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (FFN, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, FFN)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def base_tensors(seed: int = 0, **sizes: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.1 + ("norm" in name)).half()
        for name, shape in shapes(**sizes).items()
    }


def delta_tensors(seed: int = 1, **sizes: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.01).half()
        for name, shape in shapes(**sizes).items()
    }


def with_rotary(tensors: Tensors) -> Tensors:
    """As files of 2023 are: a buffer per layer that is no weight."""
    layers = {name.split(".")[2] for name in tensors if ".layers." in name}
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in layers}
    return tensors | buffers


def write_folder(
    folder: Path, tensors: Tensors, *, form: str = "bin", tokenizer: bool = True, **changes: Any
) -> Path:
    """`form`: bin or safetensors, with `-shards` for two shards and an index."""
    folder.mkdir(parents=True)
    kind, _, sharded = form.partition("-")
    stem = {"bin": "pytorch_model", "safetensors": "model"}[kind]
    save: Callable[..., Any] = {"bin": torch.save, "safetensors": save_file}[kind]
    if sharded:
        names = list(tensors)
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        index: dict[str, str] = {}
        for number, half in enumerate(halves, 1):
            file = f"{stem}-{number:05}-of-00002.{kind}"
            save({name: tensors[name] for name in half}, folder / file)
            index |= dict.fromkeys(half, file)
        write_json(folder / f"{stem}.{kind}.index.json", {"metadata": {}, "weight_map": index})
    else:
        save(tensors, folder / f"{stem}.{kind}")
    write_json(folder / "config.json", config(**changes))
    if tokenizer:
        (folder / "tokenizer.model").write_bytes(f"pieces of {folder.name}".encode())
        write_json(folder / "tokenizer_config.json", {"from": folder.name})
    return folder


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), "utf-8")


def expected(base: Tensors, delta: Tensors) -> Tensors:
    """FastChat's arithmetic: a zero row where v0 appended one, then fp16 + fp16."""
    total = {}
    for name, summand in delta.items():
        weight = base[name].half()
        if weight.shape != summand.shape:
            weight = torch.cat([weight, torch.zeros(1, weight.shape[1], dtype=torch.float16)])
        total[name] = weight + summand.half()
    return total
