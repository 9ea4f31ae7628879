"""From what a user types to files on disk: paths, aliases, hub ids, and what the cache holds.

A path never opens a socket. Light at import: pip, HTTP and huggingface_hub come in when a model has
to be looked up or fetched. Knows no tensor.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from chatserve import cache, config, environment
from chatserve.errors import HubError, ModelLoadError, UsageError

ALIASES = {
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "vicuna-7b-v1.5": "lmsys/vicuna-7b-v1.5",
    "vicuna-13b-v1.5": "lmsys/vicuna-13b-v1.5",
    "vicuna-7b-v1.5-16k": "lmsys/vicuna-7b-v1.5-16k",
    "vicuna-7b-v1.3": "lmsys/vicuna-7b-v1.3",
    "vicuna-13b-v1.3": "lmsys/vicuna-13b-v1.3",
}
DEFAULT_NAME = config.DEFAULT_WEIGHTS
DEFAULT_REVISION = "main"

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9._-]{1,96}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


@dataclass(frozen=True)
class CachedModel:
    """A model in chatserve's cache; `name` is what to type for it."""

    name: str
    revision: str
    num_bytes: int
    path: Path


def resolve_weights(
    text: str | None,
    *,
    revision: str = DEFAULT_REVISION,
    offline: bool = False,
    progress: bool = True,
    is_pull: bool = False,
) -> Path:
    """The folder or `.gguf` file that WEIGHTS means, downloaded if it has to be.

    `text`: a path, an alias, a hub id, or None for the default model. `progress` shows a download
    on stderr. `is_pull` checks a cached default model's hash again.
    Raises `UsageError` for an unknown alias, `ModelLoadError` for a path that is not there or a
    damaged file, `HubError` when a download is needed and fails or is forbidden.
    """
    offline = offline or environment.hub_offline()
    if text is not None and is_path(text):
        _refuse_revision(revision, text)
        check_path(text)
        return Path(text).expanduser()
    if text is None or text == DEFAULT_NAME:
        from chatserve.default_model import SMOLLM2_135M, ensure

        _refuse_revision(revision, DEFAULT_NAME)
        return ensure(SMOLLM2_135M, offline=offline, progress=progress, is_pull=is_pull)
    model_id = ALIASES.get(text, text)
    if not _is_hub_id(model_id):
        raise UsageError(
            f"unknown model {text!r}; name a folder, a .gguf file, a hub id (ORG/NAME), or one of "
            f"{', '.join([DEFAULT_NAME, *ALIASES])}"
        )
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise UsageError(f"{revision!r} is not a revision of a hub repository; see its page there")
    return _resolve_hub_model(model_id, revision, offline=offline, progress=progress)


def is_path(text: str) -> bool:
    """Whether `text` means a place on this machine, be it there or not.

    `a/b` is a hub id unless something of that name, or the folder `a`, is here.
    """
    if os.path.exists(os.path.expanduser(text)) or text.lower().endswith(".gguf"):
        return True
    if text.startswith((".", "~", "/")) or "\\" in text:
        return True
    first, slash, rest = text.partition("/")
    return bool(slash) and (not _is_hub_id(text) or os.path.isdir(first) or not rest)


def check_path(text: str) -> None:
    """Raises `ModelLoadError` when `text` means a place on this machine where nothing is."""
    path = Path(text).expanduser()
    if is_path(text) and not path.exists():
        raise ModelLoadError(f"{path}: no such folder or file; check the spelling")


def cached_models() -> list[CachedModel]:
    """What chatserve's cache holds, by name. Opens no model file and no socket."""
    from chatserve.hub_download import RECORD

    names = {model_id: alias for alias, model_id in ALIASES.items()}
    models = []
    folder = cache.models_folder()
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(".") or not path.is_dir():
            continue
        record = cache.read_record(path / RECORD)
        if record:
            model_id = str(record.get("id"))
            name, revision = names.get(model_id, model_id), str(record.get("revision"))
            models.append(CachedModel(name, revision, _num_bytes(path), path))
        elif path.name == DEFAULT_NAME:
            models += [
                CachedModel(DEFAULT_NAME, DEFAULT_REVISION, file.stat().st_size, file)
                for file in path.glob("*.gguf")
            ]
    return sorted(models, key=lambda model: (model.name, model.revision))


def _refuse_revision(revision: str, text: str) -> None:
    if revision != DEFAULT_REVISION:
        raise UsageError(f"--revision {revision} is for hub ids; {text} has no revisions")


def _is_hub_id(text: str) -> bool:
    return bool(_HUB_ID.fullmatch(text)) and "--" not in text and ".." not in text


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _resolve_hub_model(model_id: str, revision: str, *, offline: bool, progress: bool) -> Path:
    target = cache.models_folder() / _folder_name(model_id, revision)
    if _is_whole(target):
        return target
    shared = _find_in_hub_cache(model_id, revision)
    if shared is not None:
        return shared
    if offline:
        raise HubError(
            f"{model_id} (revision {revision}) is not in the cache and the network is off; run "
            f"`chatserve pull {model_id}` without --offline and HF_HUB_OFFLINE, or pass a folder"
        )
    _download(model_id, revision, target, progress)
    return target


def _folder_name(model_id: str, revision: str) -> str:
    name = model_id.replace("/", "--")
    return name if revision == DEFAULT_REVISION else f"{name}@{revision.replace('/', '--')}"


def _is_whole(folder: Path) -> bool:
    """Whether config and all weight files are there; tokenizer files come before them."""
    from chatserve.models.weight_files import find_weight_files

    if not (folder / "config.json").is_file():
        return False
    try:
        find_weight_files(folder)
    except ModelLoadError:
        return False
    return True


def _find_in_hub_cache(model_id: str, revision: str) -> Path | None:
    """The whole snapshot that another tool downloaded with huggingface_hub; opens no socket."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                model_id, revision=revision, local_files_only=True, allow_patterns=["config.json"]
            )
        )
    except OSError:
        return None
    return folder if _is_whole(folder) else None


def _download(model_id: str, revision: str, target: Path, progress: bool) -> None:
    from huggingface_hub import constants, get_token

    from chatserve.byte_bar import ByteBar
    from chatserve.hub_download import download

    endpoint = (environment.hub_endpoint() or constants.ENDPOINT).rstrip("/")
    if not endpoint.startswith(("http://", "https://")):
        raise UsageError(f"HF_ENDPOINT is {endpoint!r}, not an http or https URL")
    with ByteBar(f"downloading {model_id}", sys.stderr) as bar:
        report = bar if progress else _silent
        download(model_id, revision, target, endpoint=endpoint, token=get_token(), progress=report)


def _silent(done: int, total: int) -> None:
    """Where no download is shown."""
