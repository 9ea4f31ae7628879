"""The settings of a repertoire as they are written, and what they mean."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from chatserve.config import ServeConfig, served_names
from chatserve.errors import UsageError
from chatserve.server.repertoire.policy import LoadingPolicy

_TIME = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*(s|m|h|d)?", re.IGNORECASE | re.ASCII)
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def loading_policy(config: ServeConfig) -> LoadingPolicy:
    """Raises `UsageError`."""
    from chatserve.models.memory import parse_size

    max_bytes = None
    if config.max_loaded_bytes is not None:
        max_bytes = parse_size(config.max_loaded_bytes)
        if max_bytes is None:
            raise UsageError(
                f"--max-loaded-bytes {config.max_loaded_bytes!r} is no size of memory; write it as "
                "16GB or 24GiB"
            )
    if config.keep_alive is not None and not config.auto_load:
        raise UsageError(
            "--keep-alive unloads models that only --auto-load brings back; start with both"
        )
    return LoadingPolicy(
        auto_load=config.auto_load,
        max_bytes=max_bytes,
        keep_alive_s=None if config.keep_alive is None else seconds_of(config.keep_alive),
        load_timeout_s=config.load_timeout_s,
        drain_s=config.drain_timeout_s,
    )


def seconds_of(text: str) -> float:
    """Of `30m`, `90s`, `2h` or a plain number. Raises `UsageError`."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"--keep-alive {text!r} is no time; write it as 90s, 30m or 2h")
    return float(match[1]) * _SECONDS[(match[2] or "s").lower()]


def named(weights: Sequence[str], model_names: Sequence[str]) -> list[tuple[str, str]]:
    """(name, WEIGHTS) of each model. Raises `UsageError` when names and WEIGHTS do not pair up."""
    if model_names and len(model_names) != len(weights):
        raise UsageError(
            f"--model-names has {len(model_names)} names for {len(weights)} WEIGHTS; give one each"
        )
    names = [served_names(path, model_names[i : i + 1])[0] for i, path in enumerate(weights)]
    return list(zip(names, weights, strict=True))


def split_model(text: str) -> tuple[str, str]:
    """(name, WEIGHTS) of one of `--models`. Raises `UsageError`.

    A path with `=` in its first part is written with `./` before it.
    """
    name, equals, weights = text.partition("=")
    if not equals or "/" in name or os.sep in name:
        return served_names(text)[0], text
    if not name or not weights:
        raise UsageError(f"--models {text[:100]}: write WEIGHTS or NAME=WEIGHTS")
    return served_names(weights, (name,))[0], weights


def all_models(
    config: ServeConfig, weights: Sequence[str]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(name, WEIGHTS) of the models to start with, and of those that wait. Raises `UsageError`."""
    first = named(weights, config.model_names)
    waiting = [split_model(each) for each in config.models]
    if not first and not waiting:
        raise UsageError("nothing to serve; name at least one WEIGHTS")
    names = [name for name, _ in (*first, *waiting)]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"two models would be called {name}; tell them apart by --model-names, or by "
                "NAME=WEIGHTS in --models"
            )
    return first, waiting
