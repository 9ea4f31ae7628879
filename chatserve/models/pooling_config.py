"""How an embedding model wants its hidden states pooled, as sentence-transformers notes it.

Knows no network; a folder that says nothing leaves the choice to others.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Literal

from chatserve.errors import ModelLoadError
from chatserve.models.weight_files import member

logger = logging.getLogger(__name__)

FOLDER = "1_Pooling"
NAME = "config.json"
_MODES: dict[str, Literal["mean", "last"]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


def default_pooling(path: Path) -> Literal["mean", "last"] | None:
    """Of a model's folder; None where it has no such file, or names a mode that is not served.

    Raises `ModelLoadError` for a file that is damaged.
    """
    folder = path / FOLDER
    if not (folder / NAME).is_file():
        return None
    try:
        config = json.loads(member(folder, NAME).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"{folder / NAME} cannot be read: {error}; download it again"
        ) from error
    modes = config.items() if isinstance(config, dict) else ()
    wanted = [mode for mode, is_on in modes if is_on is True and "pooling_mode" in mode]
    if len(wanted) == 1 and wanted[0] in _MODES:
        return _MODES[wanted[0]]
    logger.warning(
        "%s asks for %s, which is not served: embeddings are means unless a request says last",
        folder / NAME, ", ".join(wanted) or "nothing",
    )  # fmt: skip
    return None
