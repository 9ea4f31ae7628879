"""Opening a model: a Hugging Face folder or a `.gguf` file becomes config plus a `WeightSource`.

Reads headers and small JSON files only. Knows formats and folders, but no network, no device, no
dtype policy; it never runs code that a folder brings.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatserve.errors import ModelLoadError
from chatserve.models.adapter_config import (
    ADAPTER_CONFIG,
    is_adapter,
    is_value_head,
    serve_command,
)
from chatserve.models.encoders import is_encoder, refuse_encoder
from chatserve.models.headless import is_headless, with_head, with_prefix
from chatserve.models.remote_code import warn_of_code
from chatserve.models.safetensors_file import SafetensorsFile
from chatserve.models.torch_bin import TorchBinFile
from chatserve.models.weight_files import WeightFiles, find_weight_files, gguf_hint, read_json
from chatserve.models.weights import DirectSource, TensorInfo, WeightSource

if TYPE_CHECKING:
    import torch

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "WeightSource",
    "looks_like_delta",
    "open_checkpoint",
    "open_weights",
]

FINAL_NORM = "model.norm.weight"
# A trained final norm lies around 1 and above; fine-tuning moves it by some hundredths at most.
MAX_DELTA_NORM = 0.1
# Other architectures may store norms as an offset from 1.
PLAIN_NORM_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})

_READERS: dict[str, Callable[[Path], DirectSource]] = {
    "safetensors": SafetensorsFile,
    "bin": TorchBinFile,
}


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk; `config` reads as in Hugging Face's config.json, whatever the format.

    metadata: of a GGUF file, its tokenizer and chat template included; None for a folder. has_head:
    whether it can choose tokens; else it makes embeddings only.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    weights: WeightSource
    metadata: Mapping[str, Any] | None = None
    has_head: bool = True

    @property
    def is_encoder(self) -> bool:
        return is_encoder(self.config)


def open_checkpoint(
    path: Path, *, headers_only: bool = False, may_be_encoder: bool = False
) -> Checkpoint:
    """Open a model folder or `.gguf` file; the caller closes `weights`.

    headers_only: leave out what only the weights tell (whether they are a delta's), and PyTorch.
    may_be_encoder: those are refused otherwise. Raises `ModelLoadError` when it is missing,
    damaged, or not a whole model.
    """
    if path.is_dir():
        return _open_folder(path, headers_only, may_be_encoder)
    if not path.exists():
        raise ModelLoadError(f"{path}: no such folder or file; check the spelling")
    if path.suffix.lower() != ".gguf":
        raise ModelLoadError(
            f"{path}: is a file but not a .gguf; pass the folder that holds config.json and weights"
        )
    from chatserve.models.gguf import GGUFWeights  # and NumPy, which takes a while
    from chatserve.models.gguf_parts import open_gguf

    file = open_gguf(path)
    with ExitStack() as stack:
        stack.callback(file.close)
        weights = GGUFWeights(file)
        checkpoint = Checkpoint(path, weights.config(), {}, weights, file.metadata)
        stack.pop_all()
    return checkpoint


def open_weights(folder: Path) -> WeightSource:
    """Only the weights of a model folder, delta weights too; the caller closes them.

    Raises `ModelLoadError` when they are missing, damaged, or an adapter's.
    """
    _refuse_adapter(folder)
    return _open_weights(folder, find_weight_files(folder))


def looks_like_delta(source: WeightSource) -> bool:
    """Whether these are delta weights: their final norm lies near 0 instead of near 1."""
    info = source.tensors().get(FINAL_NORM)
    if info is None or not info.dtype.is_floating_point or not all(info.shape):
        return False
    return bool(source.read(FINAL_NORM).float().abs().mean() < MAX_DELTA_NORM)


class ShardedWeights:
    """Several files as one `WeightSource`, checked against the index that came with them."""

    def __init__(self, shards: Mapping[str, DirectSource], index: Mapping[str, str]) -> None:
        """`shards` by file name. Raises `ModelLoadError` on duplicates and on a wrong index."""
        self._shards = shards
        self._home: dict[str, str] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for shard, source in shards.items():
            for name, info in source.tensors().items():
                if name in self._home:
                    raise ModelLoadError(f"{name!r} lies both in {self._home[name]} and in {shard}")
                self._home[name] = shard
                self._tensors[name] = info
        for name, shard in index.items():
            if self._home.get(name) != shard:
                where = self._home.get(name, "nowhere")
                raise ModelLoadError(
                    f"the index puts {name!r} into {shard}, it is {where}; index and shards are of "
                    "different versions, download both again"
                )

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        return self._shards[self._home[name]].read(name, rows)

    def read_into(self, name: str, rows: range, out: torch.Tensor) -> None:
        self._shards[self._home[name]].read_into(name, rows, out)

    def close(self) -> None:
        for source in self._shards.values():
            source.close()


def _open_folder(folder: Path, headers_only: bool, may_be_encoder: bool) -> Checkpoint:
    _refuse_adapter(folder)
    if not os.path.lexists(folder / "config.json"):
        raise ModelLoadError(_why_no_config(folder))
    config = read_json(folder, "config.json")
    if not may_be_encoder:
        refuse_encoder(config)
    warn_of_code(folder, config)
    generation_config = {}
    if os.path.lexists(folder / "generation_config.json"):
        generation_config = read_json(folder, "generation_config.json")
    weights = _open_weights(folder, find_weight_files(folder))
    try:
        has_head = not is_headless(config, weights)
        if not has_head:
            config, weights = with_head(config), with_prefix(weights)
        if is_adapter(folder) and all(map(is_value_head, weights.tensors())):
            raise _adapter_error(folder)
        if not headers_only:
            _refuse_delta(folder, config, weights)
    except ModelLoadError:
        weights.close()
        raise
    return Checkpoint(folder, config, generation_config, weights, has_head=has_head)


def _open_weights(folder: Path, files: WeightFiles) -> DirectSource:
    open_file = _READERS[files.format]
    if files.index is None:
        return open_file(files.paths[0])
    shards: dict[str, DirectSource] = {}
    with ExitStack() as stack:
        for path in files.paths:
            shards[path.name] = open_file(path)
            stack.callback(shards[path.name].close)
        try:
            weights = ShardedWeights(shards, files.index)
        except ModelLoadError as error:
            raise ModelLoadError(f"{folder}: {error}") from error
        stack.pop_all()
    return weights


def _refuse_adapter(folder: Path) -> None:
    """A merged model's folder may keep its adapter_config.json."""
    names = os.listdir(folder)
    has_model = any(name.startswith(("model", "pytorch_model")) for name in names)
    if is_adapter(folder) and not ("config.json" in names and has_model):
        raise _adapter_error(folder)


def _adapter_error(folder: Path) -> ModelLoadError:
    base = read_json(folder, ADAPTER_CONFIG).get("base_model_name_or_path")
    return ModelLoadError(
        f"{folder}: is a LoRA adapter for {reprlib.repr(base)}, not a whole model; serve it on its "
        f"base: {serve_command(folder, base)}"
    )


def _refuse_delta(folder: Path, config: Mapping[str, Any], weights: WeightSource) -> None:
    """The weights decide: tools of 2023 left the delta's name in the config of merged models."""
    if config.get("model_type") in PLAIN_NORM_TYPES and looks_like_delta(weights):
        raise ModelLoadError(
            f"{folder}: holds unmerged delta weights (its final norm is near 0, a model's near 1); "
            f"add them to their base model first: chatserve apply-delta BASE {folder} TARGET"
        )


def _why_no_config(folder: Path) -> str:
    if not any(folder.iterdir()):
        return f"{folder}: is empty; download a model into it (config.json, weights, tokenizer)"
    return gguf_hint(folder) or (
        f"{folder}: has no config.json; pass a folder in Hugging Face layout or a .gguf file"
    )
