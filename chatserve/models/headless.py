"""Decoders that were saved without their head: networks for embeddings. Names and configs only.

Their tensors lack the prefix `model.`, and config.json often names the bare network's class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from chatserve.models.config import NATIVE_ARCHITECTURES, architectures
from chatserve.models.weights import DirectSource, TensorInfo, WeightSource

if TYPE_CHECKING:
    import torch

PREFIX = "model."
_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"
# of the bare network's class: the one with a head, which is computed in the same way
_WITH_HEAD = {
    name.removesuffix("ForCausalLM") + "Model": name for name in reversed(NATIVE_ARCHITECTURES)
}


def is_headless(config: Mapping[str, Any], weights: WeightSource) -> bool:
    """Whether there is nothing to choose tokens with, of the networks that are native."""
    names = weights.tensors()
    if _HEAD in names or not _is_native_body(config):
        return False
    return _EMBEDDING in names or any(name in _WITH_HEAD for name in architectures(config))


def with_prefix(weights: DirectSource) -> DirectSource:
    """The weights under the names that a model with a head has."""
    return PrefixedWeights(weights) if _EMBEDDING in weights.tensors() else weights


def with_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config under the name of the class with a head."""
    names = [_WITH_HEAD.get(name, name) for name in architectures(config)]
    return {**config, "architectures": names} if names else dict(config)


class PrefixedWeights:
    """A `DirectSource` whose every name has `model.` before it."""

    def __init__(self, source: DirectSource) -> None:
        self._source = source
        self._tensors = {
            PREFIX + name: info._replace(name=PREFIX + name)
            for name, info in source.tensors().items()
        }

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        return self._source.read(name.removeprefix(PREFIX), rows)

    def read_into(self, name: str, rows: range, out: torch.Tensor) -> None:
        self._source.read_into(name.removeprefix(PREFIX), rows, out)

    def close(self) -> None:
        self._source.close()


def _is_native_body(config: Mapping[str, Any]) -> bool:
    names = architectures(config)
    return all(name in _WITH_HEAD or name in NATIVE_ARCHITECTURES for name in names) and (
        bool(names) or config.get("model_type") in ("llama", "mistral", "qwen2", "qwen3")
    )
