"""What of a hub's models lies on this disk: in chatserve's cache, and in that of the hub's tools.

Opens no socket and no weights; light at import.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatserve import cache, config
from chatserve.catalogue import ALIASES, DELTAS
from chatserve.errors import ModelLoadError
from chatserve.hub_reference import DEFAULT_REVISION, RECORD, Reference
from chatserve.models.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from chatserve.models.gguf_names import model_files, model_stem

Kind = Literal["model", "delta", "adapter"]


@dataclass(frozen=True)
class CachedModel:
    """A model in chatserve's cache, or a part of one; `name` is what to type for it."""

    name: str
    revision: str
    num_bytes: int
    path: Path
    kind: Kind = "model"


def cached_models() -> list[CachedModel]:
    """What chatserve's cache holds, by name. Opens no model file and no socket."""
    names = {model_id: alias for alias, model_id in ALIASES.items()}
    models = []
    for path in _folders(cache.models_folder()):
        record = cache.read_record(path / RECORD)
        if record:
            model_id, gguf = str(record.get("id")), record.get("gguf")
            name, revision = names.get(model_id, model_id), str(record.get("revision"))
            if "selection" in record:
                name = str(path)  # a hub id means the whole model
            elif isinstance(gguf, str):
                name, path = f"{model_id}:{model_stem(gguf)}", path / gguf
            kind = _kind(path, model_id)
            models.append(CachedModel(name, revision, _num_bytes(path), path, kind))
        elif path.name == config.DEFAULT_WEIGHTS:
            models += [
                CachedModel(path.name, DEFAULT_REVISION, file.stat().st_size, file)
                for file in path.glob("*.gguf")
            ]
    return sorted(models, key=lambda model: (model.name, model.revision))


def find_cached(reference: Reference, folder: Path | None = None) -> Path | None:
    """The folder or GGUF file that is here already, whole; `folder`: only look there."""
    found = _find_below(reference, cache.models_folder() if folder is None else folder)
    if found is not None or folder is not None:
        return found
    return _find_in_hub_cache(reference)


def is_whole(folder: Path) -> bool:
    """Whether config and all weight files, or an adapter's, are there; the others come first."""
    from chatserve.models.weight_files import find_weight_files

    if (folder / "config.json").is_file():
        with contextlib.suppress(ModelLoadError):
            find_weight_files(folder)
            return True
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    return is_adapter and any((folder / name).is_file() for name in ADAPTER_WEIGHTS)


def _folders(parent: Path) -> Iterator[Path]:
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        if not path.name.startswith(".") and path.is_dir():
            yield path


def _find_below(reference: Reference, parent: Path) -> Path | None:
    folder = parent / reference.folder_name
    if reference.gguf is None and _is_of(folder, reference) and _is_complete(folder, reference):
        return folder
    ggufs = []
    for path in _folders(parent):
        if not path.name.startswith(reference.gguf_folder_prefix):
            continue
        record = cache.read_record(path / RECORD)
        gguf = record.get("gguf")
        if not isinstance(gguf, str) or not reference.selection.keeps(gguf):
            continue
        if _is_of(path, reference):
            ggufs.append(path / gguf)
    return _choose_gguf(ggufs, reference)


def _is_complete(folder: Path, reference: Reference) -> bool:
    """Files that were selected need not make a model; their folder gets its name when all came."""
    return folder.is_dir() if reference.selection else is_whole(folder)


def _is_of(folder: Path, reference: Reference) -> bool:
    """Whether the folder's record, if it has one, says no other repository or revision."""
    record = cache.read_record(folder / RECORD)
    found = record.get("id", reference.model_id), record.get("revision", reference.revision)
    return found == (reference.model_id, reference.revision)


def _choose_gguf(files: list[Path], reference: Reference) -> Path | None:
    files = [file for file in files if all(part.is_file() for part in model_files(file))]
    if not files:
        return None
    from chatserve.hub_files import best_ggufs

    found = best_ggufs([file.name for file in files], reference.gguf)
    return next(file for file in files if file.name == found[0]) if len(found) == 1 else None


def _find_in_hub_cache(reference: Reference) -> Path | None:
    """The whole snapshot that another tool downloaded with huggingface_hub; opens no socket."""
    from huggingface_hub import snapshot_download

    if reference.selection:
        return None
    try:
        folder = Path(
            snapshot_download(
                reference.model_id,
                revision=reference.revision,
                local_files_only=True,
                allow_patterns=["config.json"],
            )
        )
    except OSError:
        return None
    if reference.gguf is None and is_whole(folder):
        return folder
    return _choose_gguf(sorted(folder.glob("*.gguf")), reference)


def _kind(path: Path, model_id: str) -> Kind:
    if model_id in DELTAS:
        return "delta"
    is_adapter = (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()
    return "adapter" if is_adapter else "model"


def _num_bytes(path: Path) -> int:
    if path.suffix == ".gguf":
        return sum(file.stat().st_size for file in model_files(path) if file.is_file())
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
