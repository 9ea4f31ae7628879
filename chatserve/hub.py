"""From what a user types to files on disk: paths, aliases and hub ids, downloaded if need be.

A path never opens a socket. Light at import: pip, HTTP and huggingface_hub come in when a model has
to be looked up or fetched. Knows no tensor.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chatserve import cache, config, environment
from chatserve.catalogue import ALIASES, CHAINS
from chatserve.errors import HubError, ModelLoadError, UsageError
from chatserve.hub_cache import CachedModel, cached_models, find_cached, is_whole
from chatserve.hub_reference import DEFAULT_REVISION, Reference, Selection, checked_revision, parse
from chatserve.models.gguf_names import model_path

if TYPE_CHECKING:
    from chatserve.hub_download import Download

__all__ = [
    "ALIASES", "DEFAULT_NAME", "DEFAULT_REVISION", "CachedModel", "Selection", "cached_models",
    "check_path", "downloading", "find_here", "find_local", "find_reference", "is_path",
    "known_names", "made_folder", "require_network", "resolve_weights",
]  # fmt: skip

DEFAULT_NAME = config.DEFAULT_WEIGHTS
_ALL = Selection()
_MAX_HINTS = 3


def resolve_weights(
    text: str | None,
    *,
    revision: str = DEFAULT_REVISION,
    offline: bool = False,
    progress: bool = True,
    is_pull: bool = False,
    selection: Selection = _ALL,
) -> Path:
    """The folder or `.gguf` file that WEIGHTS means, downloaded if it has to be.

    `text`: a path, an alias, a hub id, or None for the default model. `progress` shows a download
    on stderr. `is_pull` checks a cached default model's hash again. `selection`: of a repository's
    files.
    Raises `UsageError` for an unknown alias, `ModelLoadError` for a path that is not there, a chain
    that nobody made yet or a damaged file, `HubError` when a download is needed and fails or is
    forbidden.
    """
    if text is None or (text == DEFAULT_NAME and not is_path(text)):
        from chatserve.default_model import SMOLLM2_135M, ensure

        _refuse_revision(revision, DEFAULT_NAME)
        _refuse_selection(selection, DEFAULT_NAME)
        offline = offline or environment.hub_offline()
        return ensure(SMOLLM2_135M, offline=offline, progress=progress, is_pull=is_pull)
    found = find_local(text, revision, selection)
    if isinstance(found, Path):
        return found
    require_network(found, offline=offline)
    from chatserve.byte_bar import ByteBar

    with (
        downloading(found, cache.models_folder()) as download,
        ByteBar(f"downloading {found}", sys.stderr) as bar,
    ):
        download.prepare()
        return download.fetch(bar if progress else _silent)


def find_here(text: str | None, revision: str = DEFAULT_REVISION) -> Path:
    """The folder or `.gguf` file that is here, for commands that never fetch any.

    Raises `HubError` when there is none, else as `resolve_weights` does.
    """
    name = DEFAULT_NAME if text is None else text
    if is_here(name, revision):
        return resolve_weights(text, revision=revision, offline=True)
    is_default = name == DEFAULT_NAME and not is_path(name)
    reference = name if is_default else find_reference(name, revision)
    raise HubError(
        f"{name} is not in the cache, and only what is there is looked at; fetch it first: "
        f"`chatserve pull {reference}`"
    )


def is_here(name: str, revision: str = DEFAULT_REVISION) -> bool:
    """Whether nothing of it would have to be downloaded. Raises as `find_local` does."""
    if name == DEFAULT_NAME and not is_path(name):
        from chatserve.default_model import SMOLLM2_135M

        return SMOLLM2_135M.path.exists()
    return isinstance(find_local(name, revision), Path)


def find_local(
    text: str, revision: str = DEFAULT_REVISION, selection: Selection = _ALL
) -> Path | Reference:
    """The folder or `.gguf` file that is here, else what of the hub has to come.

    Of the default model it knows nothing. Raises as `resolve_weights` does; opens no socket.
    """
    if is_path(text):
        _refuse_revision(revision, text)
        _refuse_selection(selection, text)
        check_path(text)
        return model_path(Path(text).expanduser())
    if text in CHAINS and text not in ALIASES:
        _refuse_revision(revision, text)
        _refuse_selection(selection, text)
    is_plain = revision == DEFAULT_REVISION and not selection
    if text in CHAINS and is_plain and is_whole(made_folder(text)):
        return made_folder(text)
    reference = dataclasses.replace(find_reference(text, revision), selection=selection)
    return find_cached(reference) or reference


def is_path(text: str) -> bool:
    """Whether `text` means a place on this machine, be it there or not.

    `a/b` is a hub id unless something of that name, or the folder `a`, is here.
    """
    if os.path.exists(os.path.expanduser(text)):
        return True
    if text.lower().endswith(".gguf") and ":" not in text:
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


def check_name(text: str, revision: str = DEFAULT_REVISION) -> None:
    """Raises what `resolve_weights` would, where that can be told without a look at any file."""
    check_path(text)
    is_made = text in CHAINS and is_whole(made_folder(text))
    if not is_path(text) and text != DEFAULT_NAME and not is_made:
        find_reference(text, revision)


def made_folder(alias: str) -> Path:
    """Where a chain's model lies when it has been made."""
    return cache.models_folder() / alias


def find_reference(text: str, revision: str = DEFAULT_REVISION) -> Reference:
    """What of the hub an alias or id means.

    Raises `UsageError` for an unknown alias and two revisions, `ModelLoadError` for a chain that is
    to be made first.
    """
    alias = re.split("[@:]", text, maxsplit=1)[0]
    rest = text[len(alias) :]
    reference = parse(ALIASES.get(alias, alias) + rest)
    if reference is None and alias in CHAINS:
        chain = CHAINS[alias]
        if rest:
            raise UsageError(f"{alias} has no revisions, it is made of {chain.recipe}")
        raise ModelLoadError(
            f"{alias} is made on your machine, of {chain.recipe}, and is not there yet; make it "
            f"once: `{chain.command}`"
        )
    if reference is None:
        nearest = difflib.get_close_matches(alias, known_names(), n=_MAX_HINTS)
        hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
        raise UsageError(
            f"unknown model {text!r}; {hint}name a folder, a .gguf file, a hub id (ORG/NAME), or "
            "one that `chatserve list --names` shows"
        )
    if revision == DEFAULT_REVISION:
        return reference
    if "@" in rest and reference.revision != revision:
        raise UsageError(f"--revision {revision} and {text} name two revisions; give one")
    return dataclasses.replace(reference, revision=checked_revision(revision))


def known_names() -> list[str]:
    """What has a short name: the default model, aliases, chains."""
    return list(dict.fromkeys([DEFAULT_NAME, *ALIASES, *CHAINS]))


def require_network(reference: Reference, *, offline: bool) -> None:
    """Raises `HubError` where the network is forbidden."""
    if offline or environment.hub_offline():
        raise HubError(
            f"{reference.model_id} (revision {reference.revision}) is not in the cache and the "
            f"network is off; run `chatserve pull {reference}` without --offline and "
            "HF_HUB_OFFLINE, or pass a folder"
        )


def downloading(reference: Reference, parent: Path, *, command: str | None = None) -> Download:
    """A download into a folder below `parent`, not begun; `command` is what started it.

    Raises `UsageError` when HF_ENDPOINT is no URL.
    """
    import httpx
    from huggingface_hub import constants, get_token

    from chatserve.hub_download import Download

    endpoint = (environment.hub_endpoint() or constants.ENDPOINT).rstrip("/")
    try:
        is_url = httpx.URL(endpoint).scheme in ("http", "https")
    except httpx.InvalidURL:
        is_url = False
    if not is_url:  # not repeated, as it may hold a password
        raise UsageError("HF_ENDPOINT is not an http or https URL; set it to a hub's, or unset it")
    return Download(reference, parent, endpoint=endpoint, token=get_token(), command=command)


def _refuse_revision(revision: str, text: str) -> None:
    if revision != DEFAULT_REVISION:
        raise UsageError(f"--revision {revision} is for hub ids; {text} has no revisions")


def _refuse_selection(selection: Selection, text: str) -> None:
    if selection:
        raise UsageError(f"{selection}: patterns are for hub ids; {text} is taken as it is")


def _is_hub_id(text: str) -> bool:
    try:
        return parse(text) is not None
    except UsageError:  # of that form, with an impossible revision: told later
        return True


def _silent(done: int, total: int) -> None:
    """Where no download is shown."""
