"""Base plus delta weights: the tensors of Vicuna v0 and v1.1, some rows at a time.

target = base + delta in float16, as the deltas were made (FastChat, fastchat/model/apply_delta.py).
Knows no server, no device and no hub.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from chatserve.errors import ModelLoadError, UsageError
from chatserve.models.checkpoint import FINAL_NORM, looks_like_delta, open_weights
from chatserve.models.manifest import (
    MANIFEST_NAME,
    Manifest,
    TensorRecord,
    compare,
    dtype_name,
    parts,
    raw,
    sample,
)
from chatserve.models.merged_folder import COMPANIONS
from chatserve.models.registry import APPLIED_DELTA
from chatserve.models.safetensors_writer import FolderWriter
from chatserve.models.weight_files import member, read_json
from chatserve.models.weights import TensorInfo, WeightSource
from chatserve.progress import Progress

logger = logging.getLogger(__name__)

# v0 appended `[PAD]`, id 32000, to both (facts of the release of 2023-04: FastChat 1301bb32).
EXTENDED = frozenset({"model.embed_tokens.weight", "lm_head.weight"})
# Buffers that transformers computes itself; files of 2023 hold them as if they were weights.
_IGNORED = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


def apply_delta(
    base: Path,
    delta: Path,
    target: Path,
    *,
    force: bool = False,
    recorded: Manifest | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write base + delta to the new folder `target`: safetensors, the delta's tokenizer and config.

    `force` replaces an existing model at `target`. `recorded`: what has to come out.
    Raises `UsageError`, `ModelLoadError` naming what does not fit, and `CannotWrite`; then, as
    after a kill, `target` is what it was.
    """
    _refuse_same(base, delta)
    _refuse_made(base)
    with ExitStack() as stack:
        base_weights = _open(stack, base, "BASE")
        delta_weights = _open(stack, delta, "DELTA")
        _refuse_swapped(base, base_weights, delta, delta_weights)
        base_infos, delta_infos = _weights_of(base_weights), _weights_of(delta_weights)
        _check_match(base, base_infos, delta, delta_infos)
        addition = _Addition(base, base_weights, base_infos, delta, delta_weights, delta_infos)
        if recorded is not None:
            addition.check_sources(recorded)
        config, files = _config(delta, delta_infos), _other_files(delta)
        infos = addition.infos()
        writer = stack.enter_context(
            FolderWriter(
                target, infos, metadata={"format": "pt"}, force=force, sources=(base, delta)
            )
        )
        threads = stack.enter_context(ThreadPoolExecutor(1))
        records = {}
        done = 0
        for info in infos:
            digest = _Digest(threads)
            writer.write(info.name, addition.rows(info, digest))
            sha256 = digest.hexdigest()
            if recorded is not None:
                compare(target, info, sha256, recorded)
            records[info.name] = addition.record(info, sha256)
            done += info.num_bytes
            if progress is not None:
                progress(done, writer.num_bytes)
        for file in files:
            writer.copy_file(file)
        writer.write_json("config.json", config)
        manifest = Manifest(base.resolve().name, delta.resolve().name, records)
        writer.write_json(MANIFEST_NAME, manifest.as_json())
        writer.finish()
    return manifest


class _Digest:
    """SHA-256 of a tensor, taken in another thread while the next rows are read and added."""

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._sha256 = hashlib.sha256()
        self._last: Future[None] | None = None

    def update(self, rows: torch.Tensor) -> None:
        """`rows` may not change afterwards. Waits for the rows before: two are resident at most."""
        self._wait()
        self._last = self._threads.submit(self._sha256.update, raw(rows))

    def hexdigest(self) -> str:
        self._wait()
        return self._sha256.hexdigest()

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()


class _Addition:
    """The sum of two open checkpoints that match, in the delta's order."""

    def __init__(
        self,
        base: Path,
        base_weights: WeightSource,
        base_infos: Mapping[str, TensorInfo],
        delta: Path,
        delta_weights: WeightSource,
        delta_infos: Mapping[str, TensorInfo],
    ) -> None:
        self._base, self._base_weights, self._base_infos = base, base_weights, base_infos
        self._delta, self._delta_weights, self._delta_infos = delta, delta_weights, delta_infos

    def infos(self) -> list[TensorInfo]:
        return [
            info._replace(dtype_name="float16", num_bytes=2 * math.prod(info.shape))
            for info in self._delta_infos.values()
        ]

    def rows(self, info: TensorInfo, digest: _Digest) -> Iterator[torch.Tensor]:
        """base + delta in parts; feeds them to `digest` too. Raises `ModelLoadError`."""
        base_info, delta_info = self._base_infos[info.name], self._delta_infos[info.name]
        row_bytes = max(
            math.prod(one.shape[1:]) * one.dtype.itemsize for one in (base_info, delta_info)
        )
        for rows in parts(info, row_bytes):
            total = self._base_rows(base_info, rows).to(torch.float16)
            total += self._delta_weights.read(info.name, rows).to(torch.float16)
            # One infinite or undefined summand makes the sum so; a finite sum that is merely too
            # large for float16 is looked at again.
            if not total.sum().isfinite() and not total.isfinite().all():
                raise ModelLoadError(
                    f"{self._base} + {self._delta}: {info.name!r} has values that are not finite "
                    f"in float16, in rows {rows.start} to {rows.stop - 1}; one of the two is "
                    "damaged or not what it says, download both again"
                )
            digest.update(total)
            yield total

    def record(self, info: TensorInfo, sha256: str) -> TensorRecord:
        return TensorRecord(
            info.shape,
            dtype_name(info.dtype),
            sha256,
            sample(self._base_weights, self._base_infos[info.name]),
            sample(self._delta_weights, self._delta_infos[info.name]),
        )

    def check_sources(self, recorded: Manifest) -> None:
        """Whether both are what `recorded` was made of, by their first rows: takes a moment."""
        sides = (
            ("base", recorded.base, self._base, self._base_weights, self._base_infos),
            ("delta", recorded.delta, self._delta, self._delta_weights, self._delta_infos),
        )
        for side, name, folder, weights, infos in sides:
            differing = [
                tensor
                for tensor, record in recorded.tensors.items()
                if tensor not in infos or sample(weights, infos[tensor]) != getattr(record, side)
            ]
            if differing:
                raise ModelLoadError(
                    f"{folder}: is not the {side} that the manifest was made with ({name}): "
                    f"{len(differing)} of {len(recorded.tensors)} tensors differ, first "
                    f"{differing[0]!r}; take that {side}, or leave --recorded away"
                )

    def _base_rows(self, info: TensorInfo, rows: range) -> torch.Tensor:
        """Rows of the base; those after its last are zero, as v0's was when its delta was made."""
        known = range(rows.start, min(rows.stop, info.shape[0]))
        if known == rows:
            return self._base_weights.read(info.name, rows)
        zeros = torch.zeros(rows.stop - max(rows.start, info.shape[0]), *info.shape[1:])
        if not known:
            return zeros
        return torch.cat([self._base_weights.read(info.name, known), zeros.to(info.dtype)])


def _refuse_same(base: Path, delta: Path) -> None:
    if os.path.realpath(base) == os.path.realpath(delta):
        raise UsageError(
            f"BASE and DELTA are both {base}; BASE is the original LLaMA, DELTA what was published "
            "to be added to it"
        )


def _refuse_made(base: Path) -> None:
    """Raises `ModelLoadError` where a delta is in the base already: shapes may not tell."""
    if os.path.lexists(base / "config.json") and (
        applied := read_json(base, "config.json").get(APPLIED_DELTA)
    ):
        raise ModelLoadError(
            f"{base}: was made with the delta {str(applied)[:80]!r}, adding one again would spoil "
            f"it; BASE is the original LLaMA. To use it as it is: chatserve chat {base}"
        )


def _open(stack: ExitStack, folder: Path, what: str) -> WeightSource:
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise ModelLoadError(
            f"{folder}: {kind}; {what} is a folder in Hugging Face layout (config.json, weights)"
        )
    weights = open_weights(folder)
    stack.callback(weights.close)
    return weights


def _weights_of(weights: WeightSource) -> dict[str, TensorInfo]:
    return {name: info for name, info in weights.tensors().items() if not _IGNORED.fullmatch(name)}


def _refuse_swapped(
    base: Path, base_weights: WeightSource, delta: Path, delta_weights: WeightSource
) -> None:
    if FINAL_NORM not in base_weights.tensors() or FINAL_NORM not in delta_weights.tensors():
        return  # then other tensors are missing, too, or have other names
    is_base_delta, is_delta = looks_like_delta(base_weights), looks_like_delta(delta_weights)
    if is_base_delta and not is_delta:
        raise ModelLoadError(
            f"{base} holds delta weights and {delta} a whole model; they look swapped: "
            f"chatserve apply-delta {delta} {base} TARGET"
        )
    if is_base_delta:
        raise ModelLoadError(
            f"{base}: holds delta weights itself (its final norm is near 0, a model's near 1); "
            "BASE is the original LLaMA"
        )
    if not is_delta:
        raise ModelLoadError(
            f"{delta}: is a whole model, not delta weights (its final norm is near 1, a delta's "
            f"near 0), so there is nothing to add: chatserve chat {delta}"
        )


def _check_match(
    base: Path,
    base_infos: Mapping[str, TensorInfo],
    delta: Path,
    delta_infos: Mapping[str, TensorInfo],
) -> None:
    """Raises `ModelLoadError` unless both have the same tensors, but for v0's row."""
    layers = _num_layers(base_infos), _num_layers(delta_infos)
    if layers[0] != layers[1]:
        raise ModelLoadError(
            f"{base}: has {layers[0]} layers, the delta {delta} has {layers[1]}: it is for a model "
            "of another size, or a shard is missing; 7B has 32 layers, 13B has 40"
        )
    for name in sorted(base_infos.keys() ^ delta_infos.keys()):
        has, lacks = (base, delta) if name in base_infos else (delta, base)
        raise ModelLoadError(
            f"{lacks}: has no {name!r}, which {has} has; the two do not belong together"
        )
    for name, delta_info in delta_infos.items():
        _check_shapes(base, base_infos[name], delta, delta_info)
    num_added = {delta_infos[name].shape[0] - base_infos[name].shape[0]
                 for name in EXTENDED & delta_infos.keys()}  # fmt: skip
    if len(num_added) > 1:
        raise ModelLoadError(
            f"{delta}: appends rows to only one of embedding and head; it is damaged or of a kind "
            "that chatserve does not know"
        )
    for folder, infos in ((base, base_infos), (delta, delta_infos)):
        if any(info.dtype == torch.bfloat16 for info in infos.values()):
            logger.warning(
                "%s: is bfloat16, so the sum lacks bits that float16 weights have", folder
            )


def _check_shapes(base: Path, base_info: TensorInfo, delta: Path, delta_info: TensorInfo) -> None:
    name, ours, theirs = base_info.name, base_info.shape, delta_info.shape
    for folder, info in ((base, base_info), (delta, delta_info)):
        if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
            raise ModelLoadError(
                f"{folder}: {name!r} is {dtype_name(info.dtype)}; deltas are added to float16, "
                "take the weights that are not quantised"
            )
        if not info.shape or not all(info.shape):
            raise ModelLoadError(f"{folder}: {name!r} has the shape {info.shape}, which is empty")
    if ours == theirs:
        return
    if name not in EXTENDED or ours[1:] != theirs[1:]:
        raise ModelLoadError(
            f"{base}: {name!r} is {ours}, in the delta {delta} it is {theirs}: the delta is for a "
            "model of another size or family"
        )
    added = theirs[0] - ours[0]
    if added < 0:
        raise ModelLoadError(
            f"{base}: {name!r} has {ours[0]} rows, in the delta {delta} it has {theirs[0]}: BASE "
            "was extended already; take the original LLaMA, whose tokenizer has 32000 pieces"
        )
    if added > 1:
        raise ModelLoadError(
            f"{delta}: {name!r} has {theirs[0]} rows, {added} more than {base}; only Vicuna v0 "
            "appends a row, and it is one"
        )


def _num_layers(infos: Mapping[str, TensorInfo]) -> int:
    return len({match[1] for name in infos if (match := _LAYER.match(name))})


def _config(delta: Path, infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The delta's, with what is true of the sum, and its name: a chat template may depend on it."""
    config = read_json(delta, "config.json")
    config.pop("auto_map", None)
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = "float16"
    embedding = infos.get("model.embed_tokens.weight")
    if embedding is not None:
        config["vocab_size"] = embedding.shape[0]
    config[APPLIED_DELTA] = delta.resolve().name
    return config


def _other_files(delta: Path) -> list[Path]:
    """The delta's tokenizer: with the base's, early tools made models that never stop."""
    names = sorted(os.listdir(delta))
    if not any(name in names for name in _TOKENIZER_FILES):
        raise ModelLoadError(
            f"{delta}: has no tokenizer ({' or '.join(_TOKENIZER_FILES)}); download the whole "
            "repository of the delta"
        )
    return [
        member(delta, name)
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in COMPANIONS)
    ]
