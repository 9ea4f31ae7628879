"""A GGUF model in several files (`NAME-00001-of-00003.gguf`), read as if it were in one.

Knows the `split.*` keys and the names of parts; the bytes are `gguf_file.py`'s. Source of both:
llama.cpp's `gguf-split`. The first part holds the metadata, each its share of the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatserve.errors import ModelLoadError
from chatserve.models.gguf_file import GGUFFile
from chatserve.models.gguf_header import quote
from chatserve.models.gguf_names import Part, model_files, part_of
from chatserve.models.gguf_quants import Floats
from chatserve.models.weights import TensorInfo

if TYPE_CHECKING:
    import torch

_NUMBER, _COUNT, _NUM_TENSORS = "split.no", "split.count", "split.tensors.count"
_SPLIT_KEYS = frozenset({_NUMBER, _COUNT, _NUM_TENSORS})
_BLOCK = re.compile(r"blk\.\d+\.")


class GGUFParts:
    """All parts of one model behind `GGUFFile`'s interface; owns the files.

    `metadata` is the first part's without the keys of the split. `path` is the first part.
    """

    def __init__(self, files: Sequence[GGUFFile]) -> None:
        """`files` in order. Raises `ModelLoadError` when they are not the parts of one model."""
        self._files = files
        self.path = files[0].path
        for number, file in enumerate(files, 1):
            _check_number(file, number, len(files))
            _check_metadata(files[0], file)
        self._home: dict[str, GGUFFile] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for file in files:
            self._take(file)
        expected = files[0].metadata.get(_NUM_TENSORS)
        if expected not in (None, len(self._tensors)):
            raise ModelLoadError(
                f"{self.path}: its {len(files)} parts hold {len(self._tensors):,} tensors, its "
                f"metadata says {quote(expected)}: one is of another model; download all again"
            )
        self.metadata = {k: v for k, v in files[0].metadata.items() if k not in _SPLIT_KEYS}

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Headers by GGUF name, in disk order, part after part."""
        return self._tensors

    def type_names(self) -> Mapping[str, str]:
        """What each tensor is stored as ("Q4_1"), by GGUF name."""
        return {name: kind for file in self._files for name, kind in file.type_names().items()}

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """As `GGUFFile.read`, from the part that has it."""
        return self._home.get(name, self._files[0]).read(name, rows)

    def read_floats(self, name: str) -> Floats:
        """As `GGUFFile.read_floats`."""
        return self._home[name].read_floats(name)

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()

    def _take(self, file: GGUFFile) -> None:
        shapes = {_BLOCK.sub("", name): info.shape for name, info in self._tensors.items()}
        for name, info in file.tensors().items():
            if name in self._home:
                raise ModelLoadError(
                    f"tensor {quote(name)} lies both in {self._home[name].path} and in {file.path}:"
                    " they are parts of different models; download both again"
                )
            # Layers of one network are alike; a part brings no other sign of where it belongs.
            expected = shapes.get(_BLOCK.sub("", name), info.shape)
            if info.shape != expected:
                raise ModelLoadError(
                    f"{file.path}: tensor {quote(name)} has shape {info.shape}, in the parts "
                    f"before it is {expected}: this is a part of another model; download it again"
                )
            self._home[name] = file
            self._tensors[name] = info


GGUFSource = GGUFFile | GGUFParts


def open_gguf(path: Path) -> GGUFSource:
    """The model that `path` holds, whole or as one of its parts.

    Raises `ModelLoadError` with the file, what is wrong, and the way out.
    """
    with ExitStack() as stack:
        file = GGUFFile.open(path)
        stack.callback(file.close)
        model = file if _split_count(file) == 1 else _join(file, stack)
        stack.pop_all()
    return model


def _join(file: GGUFFile, stack: ExitStack) -> GGUFParts:
    """The parts that `file` is one of; `stack` closes them when they do not fit together."""
    count, place = _split_count(file), part_of(file.path.name)
    number = file.metadata.get(_NUMBER)
    if place is None or (place.number, place.total) != (_one_based(number), count):
        raise ModelLoadError(
            f"{file.path}: its metadata says part {_shown(number)} of {count}, its name says "
            f"{_named(place)}; give the parts the names they were published under "
            f"(NAME-00001-of-{count:05}.gguf)"
        )
    paths = model_files(file.path)
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ModelLoadError(
            f"{file.path}: is one of {count} parts, of which {_some(missing)} not beside it; "
            "download what is missing into the same folder"
        )
    files = []
    for path in paths:
        if path == file.path:
            files.append(file)
        else:
            files.append(GGUFFile.open(path))
            stack.callback(files[-1].close)
    return GGUFParts(files)


def _split_count(file: GGUFFile) -> int:
    count = file.metadata.get(_COUNT, 0)
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 1 << 16:
        raise ModelLoadError(
            f"{file.path}: {_COUNT} is {quote(count)}, not a number of files; download it again"
        )
    return max(count, 1)


def _check_number(file: GGUFFile, number: int, count: int) -> None:
    found = file.metadata.get(_NUMBER), file.metadata.get(_COUNT)
    if found != (number - 1, count):
        raise ModelLoadError(
            f"{file.path}: its metadata says part {_shown(found[0])} of {quote(found[1])}, its "
            f"name says part {number} of {count}: it is a part of another model; download it again"
        )


def _check_metadata(first: GGUFFile, file: GGUFFile) -> None:
    """What a part repeats of the metadata is the first one's."""
    for key, value in file.metadata.items():
        expected = first.metadata.get(key, None if key in _SPLIT_KEYS else value)
        if key != _NUMBER and value != expected:
            raise ModelLoadError(
                f"{file.path}: {key} is {quote(value)}, in {first.path.name} it is "
                f"{quote(expected)}: this is a part of another model; download it again"
            )


def _one_based(number: Any) -> int | None:
    is_number = isinstance(number, int) and not isinstance(number, bool)
    return number + 1 if is_number else None


def _shown(number: Any) -> str:
    one_based = _one_based(number)
    return quote(number) if one_based is None else str(one_based)


def _named(place: Part | None) -> str:
    return "none" if place is None else f"part {place.number} of {place.total}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
