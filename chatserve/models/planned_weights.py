"""The headers that a network's weights will have, worked out from its config.json alone.

For planning before anything large is fetched. Knows the Llama family's tensors; no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from chatserve.errors import ModelLoadError
from chatserve.models.checkpoint import Checkpoint
from chatserve.models.config import ModelConfig, is_native
from chatserve.models.weight_files import read_json
from chatserve.models.weights import ITEM_BYTES, TensorInfo

if TYPE_CHECKING:
    import torch

_WEIGHTS = (".safetensors", ".bin", ".gguf")


class PlannedWeights:
    """A `WeightSource` of headers: there is nothing to read yet."""

    def __init__(self, config: ModelConfig, dtype_name: str) -> None:
        self._tensors = {
            name: TensorInfo(name, shape, dtype_name, math.prod(shape) * ITEM_BYTES[dtype_name])
            for name, shape in _shapes(config)
        }

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        self._refuse(name)

    def close(self) -> None:
        """Nothing was opened."""

    def _refuse(self, name: str) -> NoReturn:
        raise ModelLoadError(f"{name}: the weights are not here yet; download them first")


def has_only_config(path: Path) -> bool:
    """Whether a folder holds a config.json and no weights, not even a part of them."""
    if not (path / "config.json").is_file():
        return False
    return not any(file.name.lower().endswith(_WEIGHTS) for file in path.iterdir())


def plan_from_config(folder: Path) -> Checkpoint:
    """The checkpoint whose weights are still to come. Raises `ModelLoadError`."""
    config = read_json(folder, "config.json")
    if not is_native(config):
        raise ModelLoadError(
            f"{folder}: sizes follow from config.json alone only for the Llama family; download "
            "the weights first"
        )
    try:
        network = ModelConfig.from_hf(config)
    except ModelLoadError as error:
        raise ModelLoadError(f"{folder}: {error}") from error
    return Checkpoint(folder, config, {}, PlannedWeights(network, _dtype_name(config)))


def _dtype_name(config: Mapping[str, Any]) -> str:
    name = config.get("dtype", config.get("torch_dtype"))
    return name if name in ("float32", "bfloat16") else "float16"


def _shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads_out, kv_out = config.num_heads * dim, config.num_kv_heads * dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    rows = {
        "self_attn.q_proj": (heads_out, hidden, config.has_qkv_bias),
        "self_attn.k_proj": (kv_out, hidden, config.has_qkv_bias),
        "self_attn.v_proj": (kv_out, hidden, config.has_qkv_bias),
        "self_attn.o_proj": (hidden, heads_out, config.has_output_bias),
        "mlp.gate_proj": (ffn, hidden, config.has_mlp_bias),
        "mlp.up_proj": (ffn, hidden, config.has_mlp_bias),
        "mlp.down_proj": (hidden, ffn, config.has_mlp_bias),
    }
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        for name, (num_rows, columns, has_bias) in rows.items():
            yield f"{prefix}.{name}.weight", (num_rows, columns)
            if has_bias:
                yield f"{prefix}.{name}.bias", (num_rows,)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        if config.has_qk_norm:
            yield f"{prefix}.self_attn.q_norm.weight", (dim,)
            yield f"{prefix}.self_attn.k_norm.weight", (dim,)
    yield "model.norm.weight", (hidden,)
    if not config.is_tied:
        yield "lm_head.weight", (config.vocab_size, hidden)
