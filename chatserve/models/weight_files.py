"""Which files of a model folder hold its weights, and that they lie inside the folder.

Reads names and small JSON files only, so the hub cache can ask without importing torch.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chatserve.errors import ModelLoadError

MAX_JSON_BYTES = 16 << 20  # parsed, a hostile file takes 25 times its size
_SINGLE_FILES = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
_SHARD_NAME = re.compile(r"(?:model|pytorch_model)-\d+-of-(\d+)\.(?:safetensors|bin)")

WeightFormat = Literal["safetensors", "bin"]


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder; `index` maps tensor names to file names, None without one."""

    format: WeightFormat
    paths: tuple[Path, ...]
    index: Mapping[str, str] | None


def find_weight_files(folder: Path) -> WeightFiles:
    """The files that hold the weights of `folder`, safetensors before `.bin`; all of them exist.

    Raises `ModelLoadError` when there are none, one is missing, or a name leads out of the folder.
    """
    for weight_format in ("safetensors", "bin"):
        single = _SINGLE_FILES[weight_format]
        if os.path.lexists(folder / single):
            return WeightFiles(weight_format, (member(folder, single),), None)
        if os.path.lexists(folder / f"{single}.index.json"):
            index = _read_index(folder, f"{single}.index.json", weight_format)
            paths = tuple(member(folder, name) for name in sorted(set(index.values())))
            return WeightFiles(weight_format, paths, index)
    raise ModelLoadError(_why_no_weights(folder))


def has_weight_files(folder: Path) -> bool:
    """Whether the folder has weights in Hugging Face layout, whole or not."""
    return any(
        os.path.lexists(folder / name) or os.path.lexists(folder / f"{name}.index.json")
        for name in _SINGLE_FILES.values()
    )


def member(folder: Path, name: str) -> Path:
    """The regular file `name` directly inside `folder`.

    Symbolic links may not lead out of the folder, except from a hub cache's snapshot to its blobs.
    Raises `ModelLoadError`.
    """
    if not _is_plain_name(name):
        raise ModelLoadError(f"{folder}: {name!r} is not a plain file name inside the folder")
    path = folder / name
    real = Path(os.path.realpath(path))
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        reason = (
            "is missing" if isinstance(error, FileNotFoundError) else f"fails: {error.strerror}"
        )
        raise ModelLoadError(
            f"{folder}: {name} {reason}; download the model again or copy the file here"
        ) from error
    if not any(real.is_relative_to(root) for root in _allowed_roots(folder)):
        raise ModelLoadError(
            f"{folder}: {name} is a link out of the folder, to {real}; put the file itself here"
        )
    if not stat.S_ISREG(mode):
        raise ModelLoadError(f"{folder}: {name} is not a regular file")
    return path


def read_json(folder: Path, name: str, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in the file `name` of `folder`. Raises `ModelLoadError`."""
    path = member(folder, name)
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ModelLoadError(f"{path}: {size} bytes of JSON, the limit is {max_bytes}")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(
            f"{path}: not readable as JSON ({error}); download the file again"
        ) from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def gguf_hint(folder: Path) -> str | None:
    """What to do with a folder that holds several GGUF models; None where there are none."""
    ggufs = sorted(name for name in os.listdir(folder) if name.lower().endswith(".gguf"))
    if not ggufs:
        return None
    return f"{folder}: holds GGUF files; pass one of them, such as {folder / ggufs[0]}"


def _is_plain_name(name: str) -> bool:
    return (
        0 < len(name) <= 255
        and name not in (".", "..")
        and name.isprintable()
        and not any(separator in name for separator in "/\\:")
    )


def _allowed_roots(folder: Path) -> list[Path]:
    """Where files of `folder` may really lie.

    The hub cache is `models--ORG--NAME/snapshots/REVISION`, whose links lead to
    `models--ORG--NAME/blobs`, and from there to the `blobs` that all repositories share.
    """
    real = Path(os.path.realpath(folder))
    roots = [real]
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        repository = real.parent.parent
        roots += [repository / "blobs", repository.parent / "blobs"]
    return roots


def _read_index(folder: Path, name: str, weight_format: WeightFormat) -> dict[str, str]:
    weight_map = read_json(folder, name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{folder / name}: has no weight_map; download the file again")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(f".{weight_format}"):
            raise ModelLoadError(
                f"{folder / name}: {tensor!r} lies in {shard!r}, not in a .{weight_format} file"
            )
    return weight_map


def _why_no_weights(folder: Path) -> str:
    names = sorted(os.listdir(folder))
    for name in names:
        if match := _SHARD_NAME.fullmatch(name):
            stem = name.split("-", 1)[0] + Path(name).suffix
            return (
                f"{folder}: has {name}, one of {int(match[1])} shards, but no {stem}.index.json; "
                "download that file too"
            )
    if hint := gguf_hint(folder):
        return hint
    wanted = "model.safetensors, pytorch_model.bin or an index of shards"
    found = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"{folder}: no weights found (wanted {wanted}; found {found or 'nothing'})"
