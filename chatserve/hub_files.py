"""Which files of a repository make a model, an adapter, or one GGUF file. Knows names and sizes.

One set of weights and never code: other formats, copies (`consolidated.*`, `original/`) and what
lies in folders are left where they are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chatserve.errors import HubError, ModelLoadError
from chatserve.hub_client import RemoteFile
from chatserve.hub_reference import Selection
from chatserve.models.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from chatserve.models.gguf_names import first_files, model_stem, part_of
from chatserve.models.weight_files import read_json

_SMALL_FILES = frozenset(
    {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "merges.txt", "chat_template.jinja", "chat_template.json",
    }
)  # fmt: skip
_FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))
_SHARD = re.compile(r"\w[\w.-]*\.(?:safetensors|bin)", re.ASCII)
_GGUF = re.compile(r"(?!mmproj)\w[\w.+-]*\.gguf", re.ASCII | re.IGNORECASE)
_PLAIN = re.compile(r"\w[\w.+-]*(?<!\.part)", re.ASCII)
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_ALL = Selection()
_MAX_SHOWN = 30


@dataclass(frozen=True)
class Choice:
    """What to fetch.

    small: come first. weights: the large ones; where `index` names a file of `small`, that says
    which. gguf: the file that is the whole model, or the first of its parts.
    """

    small: tuple[RemoteFile, ...]
    weights: tuple[RemoteFile, ...]
    index: str | None = None
    gguf: str | None = None


def choose_files(
    files: Sequence[RemoteFile],
    model_id: str,
    gguf: str | None = None,
    selection: Selection = _ALL,
) -> Choice:
    """Config, tokenizer and one set of weights: safetensors, else `.bin`, else a GGUF file.

    `gguf`: a part of the name of the GGUF file that is meant. `selection`: choose among these
    weights alone; what is included beside them comes, too, be it alone. Raises `HubError` when
    there are no weights that chatserve reads, or several that could be meant.
    """
    if not selection:
        return _choose(files, model_id, gguf)
    asked = [
        file
        for file in files
        if selection.names(file.name) and selection.keeps(file.name) and _PLAIN.fullmatch(file.name)
    ]
    if selection.include and not asked:
        raise HubError(
            f"{model_id} has no file at its top level for {selection}; its files are "
            f"{_listed([file.name for file in files])}"
        )
    beside = [file for file in asked if not file.name.endswith(_WEIGHTS)]
    if asked and len(beside) == len(asked):
        return Choice(tuple(asked), ())
    choice = _choose(_left(files, selection), model_id, gguf)
    more = (file for file in beside if file not in choice.small)
    return dataclasses.replace(choice, small=(*choice.small, *more))


def _left(files: Sequence[RemoteFile], selection: Selection) -> list[RemoteFile]:
    """The files that are kept, with config, tokenizer and the index of weights that are."""
    indices = {f"{stem}.{suffix}.index.json": (stem, suffix) for stem, suffix in _FORMATS}
    kept = {file.name for file in files if selection.keeps(file.name)} - indices.keys()
    belonging = {*_SMALL_FILES, ADAPTER_CONFIG}
    for index, (stem, suffix) in indices.items():
        if any(name.startswith(stem) and name.endswith(f".{suffix}") for name in kept):
            belonging.add(index)
    kept |= {name for name in belonging if not selection.drops(name)}
    return [file for file in files if file.name in kept]


def _choose(files: Sequence[RemoteFile], model_id: str, gguf: str | None) -> Choice:
    by_name = {file.name: file for file in files}
    if gguf is not None:
        return _choose_gguf(by_name, model_id, gguf)
    small = tuple(file for file in files if file.name in _SMALL_FILES)
    adapter = next((by_name[name] for name in ADAPTER_WEIGHTS if name in by_name), None)
    whole = _choose_model(by_name, small)
    if ADAPTER_CONFIG in by_name and adapter is not None and not _holds(whole, adapter, by_name):
        return Choice((by_name[ADAPTER_CONFIG], *small), (adapter,))
    if whole is not None:
        return whole
    if any(name.lower().endswith(".gguf") for name in by_name):
        return _choose_gguf(by_name, model_id, None)
    if ADAPTER_CONFIG in by_name:
        raise HubError(
            f"{model_id} has {ADAPTER_CONFIG} but none of {', '.join(ADAPTER_WEIGHTS)}; the "
            "repository is incomplete, try another revision"
        )
    raise HubError(f"{model_id} holds no safetensors or .bin weights; name another model")


def shards(
    folder: Path, index: str, files: Sequence[RemoteFile], model_id: str
) -> list[RemoteFile]:
    """The files that the index in `folder` names. Raises `HubError` when one is not there."""
    by_name = {file.name: file for file in files}
    try:
        weight_map = read_json(folder, index).get("weight_map")
        names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    except (ModelLoadError, TypeError) as error:
        raise HubError(f"{model_id} has a damaged {index}; try another revision") from error
    if not names:
        raise HubError(f"{model_id} has an empty {index}; try another revision")
    for name in names:
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise HubError(f"{model_id}: {index} names {name!r}, which is no weight file beside it")
        if name not in by_name:
            raise HubError(
                f"{model_id} lacks {name}, which its {index} names; the repository is incomplete, "
                "try another revision"
            )
    return [by_name[name] for name in names]


def best_ggufs(names: Sequence[str], wanted: str | None) -> list[str]:
    """The models that a user may mean: the whole name wins over a part of it.

    Of a model in several files the first, whether it is there or not.
    """
    files = first_files(name for name in names if _GGUF.fullmatch(name))
    if wanted is None:
        return files
    fits = {name: _fit(name, wanted) for name in files}
    best = max(fits.values(), default=0)
    return [name for name in files if fits[name] == best > 0]


def _choose_model(by_name: dict[str, RemoteFile], small: tuple[RemoteFile, ...]) -> Choice | None:
    for stem, suffix in _FORMATS:
        single, index = f"{stem}.{suffix}", f"{stem}.{suffix}.index.json"
        if single in by_name:
            return Choice(small, (by_name[single],))
        if index in by_name:
            return Choice((*small, by_name[index]), (), index)
    return None


def _holds(whole: Choice | None, adapter: RemoteFile, by_name: dict[str, RemoteFile]) -> bool:
    """Whether a repository with an adapter in it is a whole model all the same.

    Beside its adapters TRL left a value head, named as a model's weights are.
    """
    if whole is None or "config.json" not in by_name:
        return False
    return whole.index is not None or whole.weights[0].num_bytes > adapter.num_bytes


def _choose_gguf(by_name: dict[str, RemoteFile], model_id: str, wanted: str | None) -> Choice:
    found, names = best_ggufs(list(by_name), wanted), best_ggufs(list(by_name), None)
    if len(found) == 1:
        return Choice((), _all_parts(by_name, model_id, found[0]), gguf=found[0])
    if not names:
        raise HubError(
            f"{model_id} has no GGUF file at its top level; download the one you want yourself and "
            "pass its path"
        )
    shown = found or names
    why = "several GGUF files" if found else f"no GGUF file that {wanted!r} names"
    raise HubError(
        f"{model_id} holds {why} ({_listed(shown)}); name one of them: "
        f"`chatserve pull {model_id}:{model_stem(shown[0])}`"
    )


def _all_parts(by_name: dict[str, RemoteFile], model_id: str, first: str) -> tuple[RemoteFile, ...]:
    """The file, or all files of the model that it begins."""
    part = part_of(first)
    names = part.names if part else [first]
    for name in names:
        if name not in by_name:
            raise HubError(
                f"{model_id} lacks {name}, one of {len(names)} parts of {model_stem(first)}; the "
                "repository is incomplete, try another revision or another file"
            )
    return tuple(by_name[name] for name in names)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_SHOWN:,} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(names[:_MAX_SHOWN]) + more


def _fit(name: str, wanted: str) -> int:
    """2 for the whole name, 1 for a part of it between dots or dashes, as `Q4_K_M` mostly is."""
    stem = model_stem(name).lower()
    wanted = model_stem(f"{wanted.lower().removesuffix('.gguf')}.gguf")
    if stem == wanted:
        return 2
    return 1 if re.search(rf"(^|[-.]){re.escape(wanted)}($|[-.])", stem) else 0
