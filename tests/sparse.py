"""Checkpoints of full size that take no disk: headers, and holes where the weights would be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

SHAPES = {
    "7B": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "13B": {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
}  # fmt: skip


def llama(name: str) -> dict[str, Any]:
    return {
        **SHAPES[name], "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": 32000, "max_position_embeddings": 4096,
    }  # fmt: skip


def write_sparse(folder: Path, config: dict[str, Any], num_shards: int = 3) -> Path:
    """A checkpoint in half precision whose matrices are holes: gigabytes that take no disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for letter in "qkvo":
            shapes[f"{prefix}self_attn.{letter}_proj.weight"] = (hidden, hidden)
        shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (
            ffn, hidden,
        )  # fmt: skip
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, ffn)
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    names = list(shapes)
    step = -(-len(names) // num_shards)
    weight_map: dict[str, str] = {}
    for index in range(num_shards):
        file = f"model-{index + 1:05}-of-{num_shards:05}.safetensors"
        header: dict[str, Any] = {}
        end = 0
        for name in names[index * step : (index + 1) * step]:
            begin, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {
                "dtype": "F16", "shape": shapes[name], "data_offsets": [begin, end],
            }  # fmt: skip
            weight_map[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            if "model.norm.weight" in header:  # zeros would look like a delta
                out.seek(8 + len(text) + header["model.norm.weight"]["data_offsets"][0])
                out.write(torch.ones(hidden, dtype=torch.float16).numpy().tobytes())
            out.truncate(8 + len(text) + end)
    index_file = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file), "utf-8")
    return folder
