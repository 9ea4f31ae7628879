"""Writes a model as a Hugging Face folder; transformers 4 and 5 and chatserve read it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.models.sources import ModelSource
from chatserve.models.tokenizer_gguf import read_gguf_tokenizer

BYTES_PER_VALUE = 2


def write_folder(folder: Path, source: ModelSource, gguf_metadata: Mapping[str, Any]) -> None:
    """`gguf_metadata`: of the file whose tokenizer the model gets."""
    folder.mkdir(parents=True, exist_ok=True)
    # torch_dtype and rope_theta at the top: transformers 4 knows no other place
    config = {name: value for name, value in source.config.items() if value is not None}
    config["torch_dtype"] = "bfloat16"
    _write_json(folder / "config.json", config)
    _write_tokenizer(folder, gguf_metadata)
    _write_weights(folder / "model.safetensors", source)


def _write_weights(path: Path, source: ModelSource) -> None:
    """safetensors: the length of a JSON header, the header, the tensors in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in source.shapes.items():
        start, end = end, end + BYTES_PER_VALUE * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in source.shapes:
            file.write(source.read(name).contiguous().view(torch.uint8).numpy().data)


def _write_tokenizer(folder: Path, metadata: Mapping[str, Any]) -> None:
    """chatserve keeps special tokens out of its encoder; here they go back in."""
    parts = read_gguf_tokenizer(metadata)
    data = json.loads(parts.first.to_str())
    data["decoder"] = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
    }  # fmt: skip
    data["model"]["vocab"] |= {token.text: token.id for token in parts.added}
    data["added_tokens"] = [
        {
            "id": token.id, "content": token.text, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }
        for token in parts.added
    ]  # fmt: skip
    _write_json(folder / "tokenizer.json", data)
    # the class name that both transformers 4 and 5 know
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **parts.names}
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")
