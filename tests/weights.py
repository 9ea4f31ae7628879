"""The default model, where a test needs real weights: from chatserve's cache, never downloaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chatserve.environment import home

NAME = "smollm2-135m"


def default_model() -> Path:
    """Path of the default model; skips where it is missing, fails in CI."""
    path = home() / "models" / NAME / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        reason = "needs the default model in the cache: make chat, or chatserve pull smollm2-135m"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path
