"""Models that are made here of a base and what was published for it: fetch, apply, verify, publish.

Everything on the way lies in one hidden folder of the cache. The model gets its name when it is
whole and verified; what is interrupted goes on in the next run where it stopped. Knows no tensor.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from chatserve import cache, hub
from chatserve.byte_bar import ByteBar
from chatserve.catalogue import Chain
from chatserve.errors import CannotWrite, ModelLoadError, UsageError
from chatserve.hub_cache import find_cached, is_whole
from chatserve.hub_reference import DEFAULT_REVISION, RECORD, Reference

if TYPE_CHECKING:
    from chatserve.hub_download import Download

_BASE = "base.json"
_HASHES = "hashes.json"
_OTHER_BYTES = 32 << 20  # tokenizer, headers, config, and the room that the writer asks for
_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")


def make(chain: Chain, base: str | None, *, keep: bool = False, offline: bool = False) -> Path:
    """The folder of the chain's model, made of `base` unless it is there already.

    `base`: a folder, alias or hub id. `keep` leaves the downloaded parts in the cache; without it
    they are deleted at the end. Raises `UsageError` without a base, `ModelLoadError` when it does
    not fit, `HubError` and `CannotWrite` when a part cannot be had or the disk is full; what came
    until then is kept.
    """
    models, target = cache.models_folder(), hub.made_folder(chain.name)
    if base is None and not is_whole(target):
        raise UsageError(
            f"{chain.name} is {chain.recipe}, and the licence of {chain.base} lets nobody pass it "
            f"on: name a folder or hub id where you have it: `{chain.command}`"
        )
    from chatserve.hub_download import lock

    with ExitStack() as stack:
        with cache.writing_to(models):
            stack.enter_context(lock(models, chain.name))
        work = _Work(chain, models / f".chain-{chain.name}", base or "", offline=offline)
        if is_whole(target):
            if base is not None:
                _tell(f"{chain.name} is there already; delete {target} to make it again")
        else:
            work.run(target)
        with cache.writing_to(models):
            work.clear(keep=keep)
    return target


class _Work:
    """The making of one chain in the folder `scratch`, which nobody else writes to."""

    def __init__(self, chain: Chain, scratch: Path, base: str, *, offline: bool) -> None:
        self._chain, self._scratch, self._base_text = chain, scratch, base
        self._offline = offline
        self._models = scratch.parent
        self._made = scratch / chain.name

    def run(self, target: Path) -> None:
        """Fetch what is missing, make and verify the model, and give it its name."""
        base = self._find_base()
        with cache.writing_to(self._models):
            self._scratch.mkdir(exist_ok=True)
            self._forget_other_base(base)
        base_path, parts = self._fetch(base)
        if not self._is_made():
            self._apply(base_path, parts)
        self._verify()
        with cache.writing_to(self._models):
            cache.write_record(self._made / RECORD, self._record(base, parts))
            if target.exists():  # a part of it was deleted
                _remove(self._scratch / "damaged")
                os.replace(target, self._scratch / "damaged")
            cache.publish(self._made, target)

    def clear(self, *, keep: bool) -> None:
        """Remove what the making left, or give the parts their place in the cache."""
        if not self._scratch.exists():
            return
        for part in self._chain.parts if keep else ():
            folder = Reference(part).folder_name
            if is_whole(self._scratch / folder) and not (self._models / folder).exists():
                os.replace(self._scratch / folder, self._models / folder)
        shutil.rmtree(self._scratch)

    def _find_base(self) -> Path | Reference:
        text = self._base_text
        is_default = text == hub.DEFAULT_NAME and not hub.is_path(text)
        found = None if is_default else hub.find_local(text)
        if found is None or (isinstance(found, Path) and not found.is_dir()):
            raise UsageError(
                f"{text} is a .gguf file; the base has to be {self._chain.base} in Hugging Face "
                "layout, a folder with config.json and weights"
            )
        if isinstance(found, Path):
            _weight_bytes(found)
        return found

    def _forget_other_base(self, base: Path | Reference) -> None:
        """What a killed run made of another base is not what is asked for now."""
        named = {"base": _name_of(base)}
        for path in self._scratch.glob(f"{self._chain.name}.partial-*"):
            _remove(path)  # else it would count as taken when room is looked for
        if cache.read_record(self._scratch / _BASE) != named:
            _remove(self._made)
        cache.write_record(self._scratch / _BASE, named)

    def _is_made(self) -> bool:
        """Whether the model is there, and what it is verified with; a manifest lies in it."""
        is_verifiable = self._chain.is_delta or (self._scratch / _HASHES).exists()
        return is_whole(self._made) and is_verifiable

    def _fetch(self, base: Path | Reference) -> tuple[Path, list[Path]]:
        """Folders of the base and the parts, after telling what the disk has to hold."""
        with ExitStack() as stack:
            sources = [self._source(stack, base, self._models)]
            for part in self._chain.parts:
                reference = Reference(part)
                found = find_cached(reference) or find_cached(reference, self._scratch)
                sources.append(self._source(stack, found or reference, self._scratch))
            if self._chain.is_delta:
                self._check_sizes(*sources)
            self._require_room(sources)
            base_path, *parts = map(_fetched, sources)
        return base_path, parts

    def _source(self, stack: ExitStack, source: Path | Reference, parent: Path) -> Path | Download:
        if isinstance(source, Path):
            return source
        hub.require_network(source, offline=self._offline)
        command = f"{self._chain.command.replace('PATH_OR_ID', self._base_text)}"
        download = hub.downloading(source, parent, command=command)
        stack.enter_context(download)
        download.prepare()
        return download

    def _check_sizes(self, base: Path | Download, delta: Path | Download) -> None:
        """Before gigabytes come: whether both are of a size, as far as their configs say."""
        from chatserve.models.weight_files import read_json

        folders = [
            source if isinstance(source, Path) else source.folder for source in (base, delta)
        ]
        if not all((folder / "config.json").is_file() for folder in folders):
            return
        ours, theirs = (read_json(folder, "config.json") for folder in folders)
        for key in _SIZES:
            if ours.get(key) != theirs.get(key):
                raise ModelLoadError(
                    f"{self._base_text}: its {key} is {ours.get(key)!r}, in "
                    f"{self._chain.parts[0]} it is {theirs.get(key)!r}; the base of "
                    f"{self._chain.name} has to be {self._chain.base}"
                )

    def _require_room(self, sources: Sequence[Path | Download]) -> None:
        to_come = sum(each.missing_bytes for each in sources if not isinstance(each, Path))
        model = sources[1] if self._chain.is_delta else sources[0]
        to_write = 0
        if not self._is_made():
            size = _weight_bytes(model) if isinstance(model, Path) else model.num_bytes
            to_write = size + _OTHER_BYTES
        free = shutil.disk_usage(self._models).free
        _tell(
            f"{self._chain.name} = {self._chain.recipe}: {to_come / 1e6:,.0f} MB to download, "
            f"{to_write / 1e6:,.0f} MB to write; {self._models} has {free / 1e6:,.0f} MB free"
        )
        cache.require_free(self._models, to_come + to_write)

    def _apply(self, base: Path, parts: Sequence[Path]) -> None:
        _remove(self._made)
        (self._scratch / _HASHES).unlink(missing_ok=True)
        try:
            with ByteBar(f"making {self._chain.name}", sys.stderr) as bar:
                if self._chain.is_delta:
                    _apply_delta(base, parts[0], self._made, bar)
                else:
                    hashes = _merge(base, parts, self._made, bar)
                    with cache.writing_to(self._models):
                        cache.write_record(self._scratch / _HASHES, hashes)
        except CannotWrite as error:
            reason = getattr(error.__cause__, "strerror", None) or error.message
            raise CannotWrite(
                f"{self._chain.name} cannot be written to {self._models} ({reason}); what was "
                "fetched is kept, free some space or set CHATSERVE_HOME to a folder on another disk"
            ) from error

    def _verify(self) -> None:
        """Read the model back; one that is not what was computed is thrown away."""
        try:
            with ByteBar(f"verifying {self._chain.name}", sys.stderr) as bar:
                if self._chain.is_delta:
                    _verify_sum(self._made, bar)
                else:
                    hashes = cache.read_record(self._scratch / _HASHES)
                    _verify_merge(self._made, hashes, bar)
        except ModelLoadError as error:
            _remove(self._made)
            raise ModelLoadError(
                f"{error.message}; it was thrown away, run `{self._chain.command}` again"
            ) from error

    def _record(self, base: Path | Reference, parts: Sequence[Path]) -> dict[str, object]:
        made_of = [
            {"id": part, "commit": cache.read_record(path / RECORD).get("commit")}
            for part, path in zip(self._chain.parts, parts, strict=True)
        ]
        return {
            "id": self._chain.name, "revision": DEFAULT_REVISION, "base": _name_of(base),
            "parts": made_of,
        }  # fmt: skip


def _fetched(source: Path | Download) -> Path:
    if isinstance(source, Path):
        return source
    with ByteBar(f"downloading {source.reference}", sys.stderr) as bar:
        return source.fetch(bar)


def _apply_delta(base: Path, delta: Path, made: Path, bar: ByteBar) -> None:
    import torch

    from chatserve.models.delta import apply_delta

    torch.set_num_threads(1)  # as in `chatserve apply-delta`
    apply_delta(base, delta, made, progress=bar)


def _verify_sum(made: Path, bar: ByteBar) -> None:
    from chatserve.models.checkpoint import open_checkpoint
    from chatserve.models.manifest import read_manifest, verify

    manifest = read_manifest(made)
    with closing(open_checkpoint(made).weights) as weights:
        verify(made, weights, manifest, bar)


def _merge(base: Path, adapters: Sequence[Path], made: Path, bar: ByteBar) -> dict[str, str]:
    """SHA-256 of the tensors as they were computed."""
    from chatserve.models.checkpoint import open_checkpoint
    from chatserve.models.merge import merge
    from chatserve.models.merged_check import HashedWeights
    from chatserve.models.merged_folder import save_merged

    checkpoint = open_checkpoint(base)
    with closing(checkpoint.weights):
        merged = merge(checkpoint, adapters)
        dtypes = {name: info.dtype for name, info in checkpoint.weights.tensors().items()}
        weights = HashedWeights(merged.weights, dtypes)
        save_merged(
            dataclasses.replace(merged, weights=weights), checkpoint, made,
            dtype=None, force=False, sources=(base, *adapters), progress=bar,
        )  # fmt: skip
    return weights.hashes()


def _verify_merge(made: Path, hashes: dict[str, str], bar: ByteBar) -> None:
    from chatserve.models.merged_check import verify_hashes

    verify_hashes(made, hashes, bar)


def _weight_bytes(folder: Path) -> int:
    """Raises `ModelLoadError` when the folder holds no whole model."""
    from chatserve.models.weight_files import find_weight_files

    return sum(path.stat().st_size for path in find_weight_files(folder).paths)


def _name_of(base: Path | Reference) -> str:
    return os.path.realpath(base) if isinstance(base, Path) else str(base)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
