"""Where models and peers lie; the environment names them, nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def models_folder() -> Path:
    """CHATSERVE_BENCH_MODELS, else a folder beside chatserve's own models."""
    from chatserve.environment import home

    named = os.environ.get("CHATSERVE_BENCH_MODELS")
    return Path(named) if named else home() / "benchmark-models"


def llama_cpp_folder() -> Path | None:
    """LLAMA_CPP_BIN: the folder with llama-bench, llama-batched-bench and llama-server."""
    return _existing("LLAMA_CPP_BIN")


def fastchat_python() -> Path | None:
    """FASTCHAT_PYTHON: the interpreter of the virtual environment that has FastChat."""
    return _existing("FASTCHAT_PYTHON")


def _existing(variable: str) -> Path | None:
    value = os.environ.get(variable)
    if not value:
        return None
    path = Path(value)
    if not path.exists():
        raise SystemExit(f"{variable}={value}: no such file or folder")
    return path
