"""A model with its adapters, as requests name them: BASE, and BASE:NAME for each adapter."""

from __future__ import annotations

import hashlib

from chatserve.config import adapted_name
from chatserve.engine.sequence import LoadedAdapter
from chatserve.errors import ModelNotFound, UnsupportedParameter
from chatserve.server.contract import ServedModel


def names_of(model: ServedModel) -> list[str]:
    """All names in the API; the base's come first."""
    adapters = model.adapters.loaded()
    return [*model.names, *(adapted_name(base, name) for base in model.names for name in adapters)]


def find_adapter(model: ServedModel, name: str) -> LoadedAdapter | None:
    """What `name` adds to the base; None for the base itself. Raises `ModelNotFound`."""
    if name in model.names:
        return None
    base, _, adapter = name.rpartition(":")
    loaded = model.adapters.loaded()
    if base not in model.names or adapter not in loaded:
        raise ModelNotFound(
            f"model {name[:100]!r} is not served here; there is {', '.join(names_of(model))}",
            param="model",
        )
    return loaded[adapter]


def find_writer(model: ServedModel, name: str) -> LoadedAdapter | None:
    """The same for who wants an answer written. Raises `UnsupportedParameter` for what rates
    answers only."""
    adapter = find_adapter(model, name)
    if adapter is not None and adapter.reward is not None:
        base = name.rpartition(":")[0]
        raise UnsupportedParameter(
            f"{name[:100]} is a reward model, which writes no answers: ask {base} with rank_by: "
            f'"{adapter.name}" for the best of several, or send texts to /v1/score',
            param="model",
        )
    return adapter


def adapter_name(model_names: tuple[str, ...], lora_name: str) -> str:
    """NAME of `lora_name`, which may be NAME or BASE:NAME. Raises `ModelNotFound`."""
    for base in model_names:
        if lora_name.startswith(adapted_name(base, "")):
            return lora_name[len(adapted_name(base, "")) :]
    if ":" in lora_name:
        raise ModelNotFound(
            f"{lora_name[:100]!r} names a base that is not served here; there is "
            f"{', '.join(model_names)}",
            param="lora_name",
        )
    return lora_name


def fingerprint_of(model: ServedModel, adapter: LoadedAdapter | None) -> str:
    """Of the numbers that answer."""
    if adapter is None:
        return model.fingerprint
    digest = hashlib.sha256(f"{model.fingerprint} {adapter.fingerprint}".encode())
    return f"fp_{digest.hexdigest()[:16]}"
