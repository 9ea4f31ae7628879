"""What every benchmark line says of the machine it was taken on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import chatserve

# what decides which kernels an engine picks
_TELLING = ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")


def describe() -> dict[str, object]:
    """Commit, machine, versions; no date, so that lines of one state compare equal."""
    model_name, flags = _cpu()
    return {
        "commit": _commit(),
        "chatserve": chatserve.__version__,
        "cpu": model_name,
        "cpu_flags": " ".join(flag for flag in _TELLING if flag in flags),
        "cpus": os.cpu_count(),
        "torch": _version("torch"),
        "python": platform.python_version(),
    }


def _commit() -> str:
    """With `-dirty` where the tree differs from the commit."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def _cpu() -> tuple[str, frozenset[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor(), frozenset()
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = facts.get("flags") or facts.get("Features") or ""
    return facts.get("model name", platform.processor()), frozenset(flags.split())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
