"""The folder writer: what other readers see; a target is absent, old or new, never half."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatserve.errors import CannotWrite, ModelLoadError, UsageError
from chatserve.models import safetensors_writer
from chatserve.models.folder_swap import lock, opened
from chatserve.models.manifest import dtype_name
from chatserve.models.safetensors_file import DTYPES, SafetensorsFile
from chatserve.models.safetensors_writer import FolderWriter
from chatserve.models.weight_files import find_weight_files
from chatserve.models.weights import TensorInfo

TENSORS = {
    "embed": torch.arange(24.0).half().reshape(6, 4),
    "norm": torch.ones(4, dtype=torch.float16),
    "head": torch.arange(24.0).half().reshape(6, 4) + 1,
}


def info(name: str, tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(name, tuple(tensor.shape), dtype_name(tensor.dtype), tensor.nbytes)


INFOS = [info(name, tensor) for name, tensor in TENSORS.items()]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def write_model(target: Path, *, scale: float = 1, **options: Any) -> None:
    with FolderWriter(target, INFOS, metadata={"format": "pt"}, **options) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, (tensor * scale).split(2))
        writer.write_json("config.json", {"scale": scale})
        writer.finish()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_official_library_and_our_reader_see_what_was_written(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    official = load_file(path)
    with closing(SafetensorsFile(path)) as source:
        assert list(source.tensors()) == list(TENSORS)
        for name, tensor in TENSORS.items():
            assert source.read(name).equal(tensor) and official[name].equal(tensor)
    assert sorted(contents(tmp_path / "m")) == ["config.json", "model.safetensors"]
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    assert header_bytes % 8 == 0
    assert json.loads(path.read_bytes()[8 : 8 + header_bytes])["__metadata__"] == {"format": "pt"}


def test_every_dtype_and_shape_is_written(tmp_path: Path) -> None:
    tensors = {
        name.lower(): torch.ones(3, 4).to(getattr(torch, dtype)) for name, dtype in DTYPES.items()
    }
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4)}
    tensors["turned"] = torch.arange(6.0).reshape(2, 3).T
    infos = [info(name, tensor) for name, tensor in tensors.items()]
    with FolderWriter(tmp_path / "m", infos, metadata={}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, [tensor])
        writer.finish()
    official = load_file(tmp_path / "m/model.safetensors")
    for name, tensor in tensors.items():
        assert official[name].dtype == tensor.dtype and official[name].shape == tensor.shape
        assert raw(official[name]).equal(raw(tensor))


def test_shards_hold_at_most_their_bytes_and_an_index_names_them(tmp_path: Path) -> None:
    write_model(tmp_path / "m", max_shard_bytes=56)  # embed and norm together
    files = find_weight_files(tmp_path / "m")
    assert [path.name for path in files.paths] == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    for name, tensor in TENSORS.items():
        assert files.index is not None
        assert load_file(tmp_path / "m" / files.index[name])[name].equal(tensor)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_bytes())
    assert index["metadata"] == {"total_size": 104}


def test_files_go_to_the_disk_while_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles: list[int] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        handles.append(handle)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_model(tmp_path / "one")
    at_the_end = len(handles)
    monkeypatch.setattr(safetensors_writer, "_SYNC_BYTES", 48)
    write_model(tmp_path / "m")
    assert len(handles) - at_the_end == at_the_end + 2  # 104 bytes
    assert contents(tmp_path / "m") == contents(tmp_path / "one")


def test_a_tensor_over_the_shard_limit_has_its_own_shard(tmp_path: Path) -> None:
    write_model(tmp_path / "m", max_shard_bytes=10)
    assert len(find_weight_files(tmp_path / "m").paths) == 3


def test_files_are_copied_under_their_own_or_another_name(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"pieces")
    (tmp_path / "tokenizer.model").symlink_to(tmp_path / "real")
    with FolderWriter(tmp_path / "m", INFOS[:1], metadata={}) as writer:
        writer.write("embed", [TENSORS["embed"]])
        writer.copy_file(tmp_path / "tokenizer.model")
        writer.copy_file(tmp_path / "tokenizer.model", "other.model")
        with pytest.raises(ModelLoadError, match=r"absent: cannot be read \(No such file"):
            writer.copy_file(tmp_path / "absent", "x")
        writer.finish()
    assert (tmp_path / "m/other.model").read_bytes() == b"pieces"
    assert not (tmp_path / "m/tokenizer.model").is_symlink()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([("norm", [TENSORS["norm"]])], "embed comes next, not norm"),
        ([("embed", [TENSORS["norm"]])], r"embed: a part of torch.float16 \(4,\)"),
        ([("embed", [TENSORS["embed"].float()])], "embed: a part of torch.float32"),
        ([("embed", [TENSORS["embed"][:5]])], "40 bytes instead of 48"),
        ([("embed", [TENSORS["embed"]])], "not all tensors are written"),
        ([*((name, [tensor]) for name, tensor in TENSORS.items()), ("more", [])],
         "all tensors are written already"),
    ],
)  # fmt: skip
def test_tensors_that_were_not_announced_are_refused(
    steps: list[tuple[str, list[torch.Tensor]]], message: str, tmp_path: Path
) -> None:
    with (
        pytest.raises(ValueError, match=message),
        FolderWriter(tmp_path / "m", INFOS, metadata={}) as writer,
    ):
        for name, rows in steps:
            writer.write(name, rows)
        writer.finish()
    assert not list(tmp_path.iterdir())


def test_without_finish_nothing_is_left(tmp_path: Path) -> None:
    with FolderWriter(tmp_path / "m", INFOS, metadata={}) as writer:
        writer.write("embed", [TENSORS["embed"]])
        assert writer.folder.is_dir() and not (tmp_path / "m").exists()
    assert not list(tmp_path.iterdir())


def test_everything_is_on_disk_before_the_name_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        steps.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real_fsync(handle)

    def rename(source: Any, target: Any) -> None:
        steps.append("renamed")
        real_rename(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name descriptors")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    write_model(tmp_path / "m", max_shard_bytes=56)
    partial = f"m.partial-{os.getpid()}"
    before = {"config.json", "model.safetensors.index.json", partial}
    before |= {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert set(steps[:-2]) == before and steps[-3] == partial
    assert steps[-2:] == ["renamed", tmp_path.name]


def test_an_existing_target_is_refused_and_untouched(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    before = contents(tmp_path / "m")
    with pytest.raises(UsageError, match="exists; name a new folder, or replace it with --force"):
        write_model(tmp_path / "m", scale=2)
    assert contents(tmp_path / "m") == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_an_empty_folder_is_taken_as_the_target(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write_model(tmp_path / "m")
    assert load_file(tmp_path / "m/model.safetensors")["norm"].equal(TENSORS["norm"])


def test_force_replaces_a_model_and_nothing_of_the_old_one_stays(tmp_path: Path) -> None:
    write_model(tmp_path / "m", max_shard_bytes=10)
    write_model(tmp_path / "m", scale=2, force=True)
    assert sorted(contents(tmp_path / "m")) == ["config.json", "model.safetensors"]
    assert load_file(tmp_path / "m/model.safetensors")["norm"].equal(TENSORS["norm"] * 2)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_force_makes_a_new_folder_too(tmp_path: Path) -> None:
    write_model(tmp_path / "deep/er/m", force=True)
    assert load_file(tmp_path / "deep/er/m/model.safetensors").keys() == TENSORS.keys()


def test_force_needs_a_file_system_that_can_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(first: Path, second: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    write_model(tmp_path / "m")
    before = contents(tmp_path / "m")
    monkeypatch.setattr(safetensors_writer, "exchange", refuse)
    with pytest.raises(CannotWrite, match=r"cannot replace a folder in one step \(Invalid arg"):
        write_model(tmp_path / "m", scale=2, force=True)
    assert contents(tmp_path / "m") == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_force_spares_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    with pytest.raises(UsageError, match=r"home holds no model \(config.json\)"):
        write_model(tmp_path / "home", force=True)
    (tmp_path / "file").write_text("dear")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name in ("file", "link"):
        with pytest.raises(UsageError, match="exists and is not a folder"):
            write_model(tmp_path / name, force=True)
    with pytest.raises(UsageError, match="is no name for a new folder"):
        write_model(Path("/"), force=True)
    assert (tmp_path / "home/letter.txt").read_text() == "dear"


@pytest.mark.parametrize("target", ["base", "."])
def test_force_spares_what_is_read(target: str, tmp_path: Path) -> None:
    write_model(tmp_path / "base")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "alias").symlink_to(tmp_path / "base")
    with pytest.raises(UsageError, match=r"is or holds .*alias, which is read"):
        write_model(tmp_path / target, force=True, sources=[tmp_path / "alias"])
    assert load_file(tmp_path / "base/model.safetensors").keys() == TENSORS.keys()


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    for name in ("m.partial-1", "m.partial-x", "mm.partial-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    write_model(tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.partial-x", "mm.partial-1"]


def test_a_living_writer_keeps_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "m.partial-1"
    folder.mkdir()
    with opened(folder) as handle:
        assert lock(handle)
        write_model(tmp_path / "m")
        assert folder.exists()


def test_without_locks_leftovers_stay_and_the_model_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems have none: a leftover might be a living writer's."""

    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "m.partial-1").mkdir()
    write_model(tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.partial-1"]


def test_a_writer_locks_its_folder(tmp_path: Path) -> None:
    with (
        FolderWriter(tmp_path / "m", INFOS, metadata={}) as writer,
        opened(writer.folder) as handle,
    ):
        assert not lock(handle)


def test_a_disk_without_room_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = safetensors_writer.OTHER_BYTES + 103
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=room))
    with pytest.raises(CannotWrite, match=f"needs {room + 1:,} bytes, its disk has {room:,} free"):
        write_model(tmp_path / "m")
    assert not list(tmp_path.iterdir())
    room += 1
    write_model(tmp_path / "m")


_LIMITED = """
import resource, sys
from pathlib import Path
from chatserve.cli import main
from tests.unit.models.test_safetensors_writer import write_model
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
main.importlib.import_module = lambda name: __import__("types").SimpleNamespace(
    main=lambda argv: write_model(Path(argv[0]))
)
sys.exit(main.main(["chat", sys.argv[1]]))
"""


def test_a_write_that_fails_leaves_nothing_and_exits_1(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path / "m")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith(f"chatserve: {tmp_path}/m: cannot be written (File too large)")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB; only root may mount one."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)])
    if mounted.returncode:
        pytest.skip("this container may not mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_while_writing(small_disk: Path) -> None:
    big = TensorInfo("w", (1024, 2048), "float16", 4 << 20)

    def rows() -> Iterator[torch.Tensor]:
        yield torch.zeros(1, 2048, dtype=torch.float16)
        with open(small_disk / "other", "wb", buffering=0) as file:
            file.write(bytes(24 << 20))  # as much as there is room for
        yield torch.zeros(1023, 2048, dtype=torch.float16)

    with (
        pytest.raises(CannotWrite, match=r"cannot be written \(No space left on device\)"),
        FolderWriter(small_disk / "m", [big], metadata={}) as writer,
    ):
        writer.write("w", rows())
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_a_small_disk_is_refused(small_disk: Path) -> None:
    big = TensorInfo("w", (4096, 2048), "float16", 16 << 20)
    with pytest.raises(CannotWrite, match=r"needs 33,554,432 bytes, its disk has 25,165,824 free"):
        FolderWriter(small_disk / "m", [big], metadata={})


def test_a_read_only_disk(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CannotWrite, match=r"m: cannot be written \(Read-only file system\)"):
        write_model(small_disk / "m")


def test_a_folder_in_which_one_may_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Any, *args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(CannotWrite, match=r"m: cannot be written \(Permission denied\)"):
        write_model(tmp_path / "m")


def test_a_sync_that_fails_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards are synced in the background."""
    real = os.fsync

    def fail(handle: int) -> None:
        if "model.safetensors" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EIO, "Input/output error")
        real(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name descriptors")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CannotWrite, match=r"cannot be written \(Input/output error\)"):
        write_model(tmp_path / "m")
    assert not list(tmp_path.iterdir())
