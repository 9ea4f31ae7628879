"""LoRA adapters: `load_adapter` reads a folder of PEFT's and checks it against the base's network.

Names, ranks and shapes are checked on the headers, before any weight is read. Knows no server and
no device; what is done with the pairs (`merge`) is not decided here.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatserve.errors import ModelLoadError
from chatserve.models.adapter_config import (
    ADAPTER_CONFIG,
    AdapterConfig,
    is_adapter,
    is_score_head,
    is_value_head,
)
from chatserve.models.adapter_places import Place, adapter_places
from chatserve.models.config import ModelConfig
from chatserve.models.safetensors_file import SafetensorsFile
from chatserve.models.torch_bin import TorchBinFile
from chatserve.models.weight_files import member
from chatserve.models.weights import TensorInfo, WeightSource

if TYPE_CHECKING:
    import torch

_READERS: dict[str, Callable[[Path], WeightSource]] = {
    "adapter_model.safetensors": SafetensorsFile,
    "adapter_model.bin": TorchBinFile,
}
# PEFT's prefix; and the adapter's name ("default"), which only raw state dicts hold.
_PAIR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight")


@dataclass(frozen=True)
class LoraPair:
    """What is added to one matrix of the base: scale * b @ a. a: (r, in), b: (out, r), float32."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that fits its base.

    fingerprint: of all its numbers, whatever form they are stored in. pairs: by the name of the
    base's tensor ("model.layers.0.self_attn.q_proj.weight"). base: the model that it was trained
    on, in its author's words.
    """

    name: str
    path: Path
    fingerprint: str
    pairs: Mapping[str, LoraPair]
    base: str | None = None


def load_adapter(
    path: Path,
    config: ModelConfig,
    *,
    name: str | None = None,
    admit: Callable[[int], None] = lambda num_values: None,
    is_reward: bool = False,
) -> Adapter:
    """The adapter in the folder `path`, called `name` or as the folder, for a base of `config`.

    is_reward: it is a reward model's, whose score head `load_score_head` reads. `admit` is asked,
    before they are read, whether there is room for so many numbers. Raises `ModelLoadError` when it
    is damaged, not LoRA alone, or does not fit the base.
    """
    settings = AdapterConfig.read(adapter_folder(path), is_reward=is_reward)
    with closing(open_adapter_weights(path)) as weights:
        parts = _Parts(path, settings, weights.tensors(), is_reward)
        parts.check(adapter_places(config), config)
        admit(parts.num_values)
        pairs = {
            f"{module}.weight": LoraPair(
                _read(path, weights, names["A"]),
                _read(path, weights, names["B"]),
                settings.scale_of(module),
            )
            for module, names in parts.by_module.items()
        }
    name = name or Path(os.path.abspath(path)).name
    return Adapter(name, path, _fingerprint(pairs), pairs, settings.base)


def count_values(path: Path, config: ModelConfig, *, is_reward: bool = False) -> int:
    """How many numbers the adapter in the folder `path` has, by its headers alone.

    Raises `ModelLoadError` as `load_adapter` does.
    """
    settings = AdapterConfig.read(adapter_folder(path), is_reward=is_reward)
    with closing(open_adapter_weights(path)) as weights:
        parts = _Parts(path, settings, weights.tensors(), is_reward)
        parts.check(adapter_places(config), config)
        return parts.num_values


def adapter_folder(path: Path) -> Path:
    """`path`, which holds an adapter. Raises `ModelLoadError` that says what it holds instead."""
    if not path.exists():
        raise ModelLoadError(
            f"{path}: no such folder; an adapter is a folder with {ADAPTER_CONFIG} on this "
            f"machine; `chatserve pull NAME` fetches a published one and prints its path"
        )
    if not path.is_dir():
        raise ModelLoadError(
            f"{path}: is a file; pass the folder that holds {ADAPTER_CONFIG} and the weights"
        )
    if is_adapter(path):
        return path
    if (path / "config.json").exists():
        raise ModelLoadError(
            f"{path}: is a whole model, not an adapter; use it as one: chatserve serve {path}"
        )
    raise ModelLoadError(
        f"{path}: has no {ADAPTER_CONFIG}, so it is no adapter; pass the folder that training saved"
    )


def open_adapter_weights(path: Path) -> WeightSource:
    """The tensors beside an adapter's config; the caller closes them. Raises `ModelLoadError`."""
    for file, reader in _READERS.items():
        if os.path.lexists(path / file):
            return reader(member(path, file))
    raise ModelLoadError(
        f"{path}: has {ADAPTER_CONFIG} but no weights (wanted {' or '.join(_READERS)}); "
        "the download is incomplete, or the adapter is merged into the model beside it already"
    )


class _Parts:
    """The tensors of an adapter's file, paired by the module that they belong to."""

    def __init__(
        self,
        path: Path,
        settings: AdapterConfig,
        infos: Mapping[str, TensorInfo],
        is_reward: bool,
    ) -> None:
        """Raises `ModelLoadError` for tensors that belong to no pair."""
        self._path, self._settings, self._infos = path, settings, infos
        self.by_module: dict[str, dict[str, str]] = {}
        for name in infos:
            if is_value_head(name) or (is_reward and is_score_head(name)):
                continue
            match = _PAIR.fullmatch(name)
            if match is None:
                raise self._bad(
                    f"holds {name!r}, which is no part of a LoRA pair; merge it with peft's "
                    "merge_and_unload where it was trained, and serve the result"
                )
            if match[2] in self.by_module.setdefault(match[1], {}):
                raise self._bad(f"holds lora_{match[2]} of {match[1]!r} twice; get it again")
            self.by_module[match[1]][match[2]] = name
        if not self.by_module:
            raise self._bad(
                "holds no LoRA weights: early training scripts saved empty files; get another copy"
            )

    @property
    def num_values(self) -> int:
        names = (name for pair in self.by_module.values() for name in pair.values())
        return sum(math.prod(self._infos[name].shape) for name in names)

    def check(self, matrices: Mapping[str, Place], config: ModelConfig) -> None:
        """That every pair fits its matrix, and every target has its pair."""
        for module, names in self.by_module.items():
            if module not in matrices:
                raise self._bad(_why_no_matrix(module, config) + self._trained_on())
            for part in "AB":
                if part not in names:
                    raise self._bad(f"lacks lora_{part} of {module!r}; get it again")
            place = matrices[module]
            self._check_pair(module, names, (place.rows, place.columns))
        expected = self._settings.expected(matrices)
        if expected is None:
            return
        if missing := [module for module in expected if module not in self.by_module]:
            raise self._bad(
                f"lacks {len(missing)} of {len(expected)} modules that {ADAPTER_CONFIG} targets, "
                f"first {missing[0]}; it is incomplete, or the base has more layers"
                + self._trained_on()
            )
        if extra := sorted(self.by_module.keys() - set(expected)):
            raise self._bad(
                f"holds {len(extra)} modules that {ADAPTER_CONFIG} does not target, first "
                f"{extra[0]}; the two files belong to different adapters"
            )

    def _check_pair(self, module: str, names: Mapping[str, str], shape: tuple[int, int]) -> None:
        a, b = self._infos[names["A"]], self._infos[names["B"]]
        if not a.is_real or not b.is_real:
            form = f"{a.dtype_name} and {b.dtype_name}"
            raise self._bad(f"holds {module!r} as {form}, not as real numbers")
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise self._bad(f"holds {module!r} in shapes {a.shape} and {b.shape}, not as matrices")
        rank = self._settings.rank_of(module)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise self._bad(
                f"holds {module!r} in rank {a.shape[0]} and {b.shape[1]}, {ADAPTER_CONFIG} says "
                f"{rank}; the two files belong to different adapters"
            )
        if (b.shape[0], a.shape[1]) != shape:
            raise self._bad(
                f"fits a {module!r} of shape {(b.shape[0], a.shape[1])}, this base's is {shape}; "
                "it belongs to another base" + self._trained_on()
            )

    def _trained_on(self) -> str:
        return f" (it was trained on {self._settings.base!r})" if self._settings.base else ""

    def _bad(self, reason: str) -> ModelLoadError:
        return ModelLoadError(f"{self._path}: the adapter {reason}")


def _why_no_matrix(module: str, config: ModelConfig) -> str:
    if module == "lm_head":
        return (
            "changes lm_head, which this base shares with its embedding: the embedding would change"
            " with it; merge it with peft where it was trained"
        )
    return (
        f"changes {module!r}, which this base of {config.num_layers} layers does not have; "
        "it belongs to another base"
    )


def _read(path: Path, weights: WeightSource, name: str) -> torch.Tensor:
    values = weights.read(name).float()
    if not bool(values.isfinite().all()):
        raise ModelLoadError(
            f"{path}: the adapter's {name!r} holds values that are no numbers (inf or nan); the "
            "training diverged or the file is damaged"
        )
    return values


def _fingerprint(pairs: Mapping[str, LoraPair]) -> str:
    digest = hashlib.sha256()
    for name, pair in sorted(pairs.items()):
        digest.update(f"{name} {tuple(pair.a.shape)} {tuple(pair.b.shape)} {pair.scale}\n".encode())
        digest.update(pair.a.numpy().data)
        digest.update(pair.b.numpy().data)
    return f"ad_{digest.hexdigest()[:16]}"
