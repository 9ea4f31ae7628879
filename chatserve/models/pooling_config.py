"""How an embedding model wants its hidden states pooled, as sentence-transformers notes it.

Knows no network; a folder that says nothing leaves the choice to others.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

from chatserve.errors import ModelLoadError
from chatserve.models.weight_files import member

logger = logging.getLogger(__name__)

FOLDER = "1_Pooling"
NAME = "config.json"
MODULES = "modules.json"
SETTINGS = "sentence_bert_config.json"
_MODES: dict[str, Literal["mean", "last"]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_CLS = "pooling_mode_cls_token"
_MODULES = ("Transformer", "Pooling", "Normalize")


def default_pooling(path: Path) -> Literal["mean", "last"] | None:
    """Of a model's folder; None where it has no such file, or names a mode that is not served.

    Raises `ModelLoadError` for a file that is damaged.
    """
    wanted = _wanted(path)
    if wanted is None:
        return None
    if len(wanted) == 1 and wanted[0] in _MODES:
        return _MODES[wanted[0]]
    logger.warning(
        "%s asks for %s, which is not served: embeddings are means unless a request says last",
        path / FOLDER / NAME, ", ".join(wanted) or "nothing",
    )  # fmt: skip
    return None


def encoder_pooling(path: Path) -> Literal["mean", "last", "cls"]:
    """The same of an encoder, the mean where nothing is said.

    Raises `ModelLoadError`, too, for what is not served: other vectors would be of no use.
    """
    wanted = _wanted(path)
    if wanted is None:
        return "mean"
    if wanted == [_CLS]:
        return "cls"
    if len(wanted) == 1 and wanted[0] in _MODES:
        return _MODES[wanted[0]]
    raise ModelLoadError(
        f"{path / FOLDER / NAME} asks for {', '.join(wanted)[:200] or 'nothing'}, which is not "
        "served; mean, last and cls are, one of them alone"
    )


def refuse_further_modules(path: Path) -> None:
    """Raises `ModelLoadError` where something is computed of the pooled vector."""
    modules = _read(path, MODULES)
    for module in modules if isinstance(modules, list) else ():
        kind = str(module.get("type") if isinstance(module, dict) else module).rpartition(".")[2]
        if kind not in _MODULES:
            raise ModelLoadError(
                f"{path / MODULES} asks for a {kind[:80]!r} behind the network, which is not "
                f"served; {', '.join(_MODULES)} are"
            )


def max_tokens(path: Path) -> int | None:
    """The longest text that an embedding model's folder wants to be given, in tokens."""
    settings = _read(path, SETTINGS)
    value = settings.get("max_seq_length") if isinstance(settings, dict) else None
    return value if type(value) is int and value > 0 else None


def _wanted(path: Path) -> list[str] | None:
    """Of `_MODES` and their like, those that are on; None without a file."""
    config = _read(path / FOLDER, NAME)
    if config is None:
        return None
    modes = config.items() if isinstance(config, dict) else ()
    return [mode for mode, is_on in modes if is_on is True and "pooling_mode" in mode]


def _read(folder: Path, name: str) -> Any:
    if not (folder / name).is_file():
        return None
    try:
        return json.loads(member(folder, name).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"{folder / name} cannot be read: {error}; download it again"
        ) from error
