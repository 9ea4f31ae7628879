"""Writes a model as a GGUF file for llama.cpp, with llama.cpp's own Python package `gguf`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from benchmarks.models.sources import ModelSource

# type of the matrices -> its number in general.file_type
FILE_TYPES = {"bf16": 32, "f16": 1, "q8_0": 7, "q4_0": 2}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, source: ModelSource, kind: str, tokenizer: Path) -> None:
    """`kind`: one of `FILE_TYPES`; norms stay float32. `tokenizer`: a GGUF file to copy it from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    matrix_type = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(path, "llama")
    _add_metadata(writer, source.config, kind)
    _copy_tokenizer(writer, tokenizer)
    types = {
        name: matrix_type if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        for name, shape in source.shapes.items()
    }
    for name, shape in source.shapes.items():
        row_bytes = gguf.quant_shape_to_byte_shape(shape, types[name])
        writer.add_tensor_info(
            _gguf_name(name), row_bytes, np.dtype(np.uint8), int(np.prod(row_bytes)), types[name]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in source.shapes:
        rows = _in_gguf_order(source.read(name).float(), name, source.config).numpy()
        data = gguf.quants.quantize(np.ascontiguousarray(rows), types[name])
        writer.write_tensor_data(data.view(np.uint8))
    writer.close()


def _add_metadata(writer: Any, config: Any, kind: str) -> None:
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _copy_tokenizer(writer: Any, path: Path) -> None:
    for field in gguf.GGUFReader(path).fields.values():
        if not field.name.startswith("tokenizer."):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(field.name, field.contents())
        else:
            writer.add_key_value(field.name, field.contents(), field.types[0])


def _gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{suffix}"
    _, _, index, part = stem.split(".", 3)
    return f"blk.{index}.{_NAMES[part]}.{suffix}"


def _in_gguf_order(rows: torch.Tensor, name: str, config: Any) -> torch.Tensor:
    """llama.cpp rotates neighbouring rows of q and k, Hugging Face the two halves of a head."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    key = heads.get(name.split(".")[-2])
    if key is None:
        return rows
    halves = rows.view(config[key], 2, -1, rows.shape[-1])
    return halves.transpose(1, 2).reshape(rows.shape)
