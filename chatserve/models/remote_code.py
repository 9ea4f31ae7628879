"""What a model folder says of code of its own: none of it is ever run, and that is said."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def warn_of_code(folder: Path, *contents: Mapping[str, Any]) -> None:
    """Once, whichever of its files names some."""
    if any("auto_map" in content for content in contents):
        logger.warning("%s: auto_map ignored, chatserve never runs a model folder's code", folder)
