"""Bytes of one open file: the same by either way of reading, and several reads at a time."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch

from chatserve.errors import ModelLoadError
from chatserve.models.weight_file import WeightFile

CONTENT = bytes(range(256)) * 8


@pytest.fixture(params=["at an offset", "after a seek"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both ways; a system has the first one, or not."""
    if request.param == "after a seek":
        monkeypatch.delattr(os, "preadv", raising=False)
    elif not hasattr(os, "preadv"):
        pytest.skip("this system cannot read at an offset")
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    return path


def test_threads_read_what_lies_at_their_offsets(file: Path) -> None:
    def read(offset: int) -> bool:
        out = torch.empty(100, dtype=torch.uint8)
        weights.read_into(offset, out)
        return bytes(out.numpy()) == CONTENT[offset : offset + 100] == weights.read(offset, 100)

    with closing(WeightFile(file)) as weights, ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(0, 1900)))


def test_a_file_that_became_shorter_is_named(file: Path) -> None:
    with closing(WeightFile(file)) as weights:
        os.truncate(file, 1000)
        assert weights.read(900, 100) == CONTENT[900:1000]
        with pytest.raises(ModelLoadError, match="weights: became shorter while it was read"):
            weights.read(900, 101)


def test_a_folder_cannot_be_read(file: Path) -> None:
    with closing(WeightFile(file)) as weights:
        folder = os.open(file.parent, os.O_RDONLY)
        os.dup2(folder, weights._file.fileno())
        os.close(folder)
        with pytest.raises(ModelLoadError, match="weights: cannot be read"):
            weights.read(0, 10)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system cannot read at an offset")
def test_no_reader_waits_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read begins only when another has begun: one after the other would wait for ever."""
    (tmp_path / "weights").write_bytes(CONTENT)
    together, real = threading.Barrier(2), os.preadv
    readers = set[int]()

    def wait(*args: object) -> int:
        readers.add(threading.get_ident())
        together.wait(timeout=30)
        return real(*args)  # type: ignore[arg-type]  # as it was called

    with closing(WeightFile(tmp_path / "weights")) as weights, ThreadPoolExecutor(2) as threads:
        monkeypatch.setattr(os, "preadv", wait)
        parts = list(threads.map(weights.read, (0, 700), (700, 700)))
    assert b"".join(parts) == CONTENT[:1400] and len(readers) == 2
