"""Writer of a model folder: safetensors shards, their index and the files beside them.

Everything is written to a folder beside the target and renamed at the end, so that the target is
absent, old or new, never half. Knows no family and no reader: it gets shapes first, rows later.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import torch

from chatserve.errors import CannotWrite, ModelLoadError, UsageError
from chatserve.models.folder_swap import exchange, lock, opened, sync
from chatserve.models.safetensors_file import DTYPES
from chatserve.models.weights import TensorInfo

MAX_SHARD_BYTES = 5_000_000_000
OTHER_BYTES = 16 << 20  # room for headers, tokenizer, config
_PART_BYTES = 1 << 20
# So much goes to the disk while the next is computed; the system alone would wait for gigabytes.
_SYNC_BYTES = 128 << 20
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CONFIGS = ("config.json", "adapter_config.json")


class _Shard(NamedTuple):
    """One file and its tensors, in order."""

    name: str
    infos: tuple[TensorInfo, ...]


class FolderWriter:
    """A new model folder; a context manager that leaves nothing behind unless `finish` was called.

    Killed, it leaves `TARGET.partial-<pid>`, which the next writer of the same target removes.
    """

    def __init__(
        self,
        target: Path,
        infos: Sequence[TensorInfo],
        *,
        metadata: Mapping[str, str],
        max_shard_bytes: int = MAX_SHARD_BYTES,
        force: bool = False,
        sources: Sequence[Path] = (),
    ) -> None:
        """`infos`: all tensors, in the order of `write`; only name, shape and dtype count.

        `metadata` goes into every shard's header. `force` replaces an existing model folder,
        but never one of `sources` or a folder around one.
        Raises `UsageError` for a target that may not be written, `CannotWrite` when it cannot be.
        """
        self.target = Path(os.path.abspath(target))
        _refuse_target(self.target, sources, force=force)
        self._force = force
        self._metadata = dict(metadata)
        self._shards = iter(_split(infos, max_shard_bytes))
        self._weight_map = {
            info.name: shard.name
            for shard in _split(infos, max_shard_bytes)
            for info in shard.infos
        }
        self.num_bytes = sum(_num_bytes(info) for info in infos)
        self._waiting: list[TensorInfo] = []
        self._file: BinaryIO | None = None
        self._syncs: list[Future[None]] = []
        self._unsynced_bytes = 0
        self._stack = contextlib.ExitStack()
        self.folder = self.target.with_name(f"{self.target.name}.partial-{os.getpid()}")
        with self._failures():
            self._make_folder()

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def write(self, name: str, rows: Iterable[torch.Tensor]) -> None:
        """The next tensor of `infos`, as parts along its first dimension.

        Only one part at a time is resident. Raises `CannotWrite`.
        """
        with self._failures():
            info, file = self._next()
            if name != info.name:
                raise ValueError(f"{info.name} comes next, not {name}")
            done = 0
            for part in rows:
                if part.dtype != info.dtype or part.shape[1:] != info.shape[1:]:
                    raise ValueError(f"{name}: a part of {part.dtype} {tuple(part.shape)}")
                done += _write_all(file, part)
                self._sync_some(file, part.nbytes)
            if done != _num_bytes(info):
                raise ValueError(f"{name}: {done} bytes instead of {_num_bytes(info)}")
            if not self._waiting:
                self._close_shard()

    def copy_file(self, source: Path, name: str | None = None) -> None:
        """A file beside the weights, under its own name or `name`.

        Raises `CannotWrite`, or `ModelLoadError` when the source cannot be read.
        """
        with self._failures(), open(self.folder / (name or source.name), "xb") as copy:
            for part in _parts(source):
                copy.write(part)
            _sync_file(copy)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """A JSON file beside the weights. Raises `CannotWrite`."""
        with self._failures(), open(self.folder / name, "xb") as file:
            file.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")
            _sync_file(file)

    def finish(self) -> None:
        """Give the whole folder its name; afterwards it survives a crash. Raises `CannotWrite`."""
        if self._waiting or next(self._shards, None) is not None:
            raise ValueError("not all tensors are written")
        files = sorted(set(self._weight_map.values()))
        if len(files) > 1:
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": self._weight_map}
            self.write_json("model.safetensors.index.json", index)
        with self._failures():
            for future in self._syncs:
                future.result()
            sync(self.folder)
            if os.path.lexists(self.target) and self._force:
                exchange(self.folder, self.target)
            else:
                os.rename(self.folder, self.target)
            sync(self.target.parent)

    def _make_folder(self) -> None:
        parent = self.target.parent
        parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self.target)
        free = shutil.disk_usage(parent).free
        if free < self.num_bytes + OTHER_BYTES:
            raise CannotWrite(
                f"{self.target}: needs {self.num_bytes + OTHER_BYTES:,} bytes, its disk has "
                f"{free:,} free; free some space or name a target on another disk"
            )
        self.folder.mkdir()
        # after an exchange the old model has this name
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self._stack.callback(self._close_file)
        try:
            lock(self._stack.enter_context(opened(self.folder)))
            self._threads = self._stack.enter_context(ThreadPoolExecutor(1))
            if self._force and os.path.lexists(self.target):
                self._require_exchange()
        except BaseException:
            self._stack.close()
            raise

    def _require_exchange(self) -> None:
        """Ask before hours of work whether the file system can replace a folder at once."""
        probes = self.folder / "probe-1", self.folder / "probe-2"
        for probe in probes:
            probe.mkdir()
        try:
            exchange(*probes)
        except OSError as error:
            raise CannotWrite(
                f"{self.target}: its file system cannot replace a folder in one step "
                f"({error.strerror}); name a new target, or remove this one first"
            ) from error
        for probe in probes:
            probe.rmdir()

    def _next(self) -> tuple[TensorInfo, BinaryIO]:
        if self._file is None:
            shard = next(self._shards, None)
            if shard is None:
                raise ValueError("all tensors are written already")
            self._waiting = list(shard.infos)
            self._file = open(self.folder / shard.name, "xb", buffering=0)  # noqa: SIM115
            _write_all(self._file, _header(shard.infos, self._metadata))
        return self._waiting.pop(0), self._file

    def _sync_some(self, file: BinaryIO, num_bytes: int) -> None:
        self._unsynced_bytes += num_bytes
        if self._unsynced_bytes >= _SYNC_BYTES:
            self._unsynced_bytes = 0
            self._syncs.append(self._threads.submit(os.fsync, file.fileno()))

    def _close_shard(self) -> None:
        """The disk gets the shard while the next one is computed."""
        assert self._file is not None
        file, self._file = self._file, None
        self._syncs.append(self._threads.submit(_sync_and_close, file))

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CannotWrite(
                f"{self.target}: cannot be written ({error.strerror or error}); "
                "name a target on a disk with room where you may write"
            ) from error


def _refuse_target(target: Path, sources: Sequence[Path], *, force: bool) -> None:
    if not target.name:
        raise UsageError(f"{target} is no name for a new folder; name one that does not exist")
    real = Path(os.path.realpath(target))
    for source in sources:
        if Path(os.path.realpath(source)).is_relative_to(real):
            raise UsageError(
                f"the target {target} is or holds {source}, which is read; name another"
            )
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise UsageError(f"{target} exists and is not a folder; name a new folder")
    names = os.listdir(target)
    if not names:
        return
    if not force:
        raise UsageError(f"{target} exists; name a new folder, or replace it with --force")
    if not any(name in names for name in _CONFIGS):
        raise UsageError(
            f"{target} holds no model ({_CONFIGS[0]}), so it is not replaced; name another"
        )


def _remove_leftovers(target: Path) -> None:
    """Remove what killed writers of the same target left; a living one holds its lock."""
    pattern = re.compile(re.escape(target.name) + r"\.partial-\d+")
    for path in target.parent.iterdir():
        if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError), opened(path) as handle:  # not ours: leave it
                if lock(handle):
                    shutil.rmtree(path)


def _split(infos: Sequence[TensorInfo], max_bytes: int) -> list[_Shard]:
    groups: list[list[TensorInfo]] = [[]]
    num_bytes = 0
    for info in infos:
        if groups[-1] and num_bytes + _num_bytes(info) > max_bytes:
            groups.append([])
            num_bytes = 0
        groups[-1].append(info)
        num_bytes += _num_bytes(info)
    if len(groups) == 1:
        return [_Shard("model.safetensors", tuple(groups[0]))]
    return [
        _Shard(f"model-{number:05}-of-{len(groups):05}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    ]


def _header(infos: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for info in infos:
        end = begin + _num_bytes(info)
        entries[info.name] = {
            "dtype": _DTYPE_NAMES[info.dtype_name], "shape": info.shape,
            "data_offsets": (begin, end),
        }  # fmt: skip
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _num_bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def _parts(source: Path) -> Iterator[bytes]:
    try:
        with open(source, "rb") as file:
            while part := file.read(_PART_BYTES):
                yield part
    except OSError as error:
        raise ModelLoadError(f"{source}: cannot be read ({error.strerror})") from error


def _write_all(file: BinaryIO, data: bytes | torch.Tensor) -> int:
    """Write it whole: one call of the system takes at most 2 GB, and less on a full disk."""
    if isinstance(data, torch.Tensor):
        view = data.contiguous().reshape(-1).view(torch.uint8).numpy().data
    else:
        view = memoryview(data)
    done = 0
    while done < len(view):
        done += file.write(view[done:])
    return done


def _sync_file(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_and_close(file: BinaryIO) -> None:
    with file:
        os.fsync(file.fileno())
