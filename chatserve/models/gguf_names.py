"""What the names of GGUF files say: which parts make one model, and where its first part lies.

Reads names only, so the hub cache can ask without NumPy or PyTorch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from chatserve.models.weight_files import has_weight_files

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII)


class Part(NamedTuple):
    """One file of a model in several: `NAME-00002-of-00003.gguf`, as llama.cpp names them."""

    stem: str
    number: int  # from 1
    total: int

    @property
    def names(self) -> list[str]:
        """Of all parts, in order."""
        return [f"{self.stem}-{n:05}-of-{self.total:05}{SUFFIX}" for n in range(1, self.total + 1)]


def part_of(name: str) -> Part | None:
    """Which part a file is by its name, None for a whole model."""
    match = _PART.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return None
    return Part(match["stem"], int(match["number"]), int(match["count"]))


def model_stem(name: str) -> str:
    """The name of the model in the file, or in the parts that it is one of."""
    part = part_of(name)
    if part is not None:
        return part.stem
    return name[: -len(SUFFIX)] if name.lower().endswith(SUFFIX) else name


def model_files(path: Path) -> list[Path]:
    """The file, or all parts of the model that it is one of, be they there or not."""
    part = part_of(path.name)
    return [path] if part is None else [path.with_name(name) for name in part.names]


def first_files(names: Iterable[str]) -> list[str]:
    """One name of each model: whole files, and the first of each set of parts."""
    found = {name: part_of(name) for name in names}
    return sorted({part.names[0] if part else name for name, part in found.items()})


def is_model_name(name: str) -> bool:
    """Whether a GGUF file's name is not that of a vision tower, which lies beside its model."""
    return name.lower().endswith(SUFFIX) and not name.lower().startswith("mmproj")


def model_path(path: Path) -> Path:
    """The file to open for what a user has named.

    A part means its model's first part. A folder that holds one GGUF model and no other weights
    means that model. Everything else stays as it is.
    """
    if path.is_dir():
        names = [] if has_weight_files(path) else filter(is_model_name, os.listdir(path))
        found = first_files(names)
        if len(found) != 1:
            return path
        path = path / found[0]
    return next((file for file in model_files(path) if file.exists()), path)
