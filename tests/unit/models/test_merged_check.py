"""SHA-256 of tensors on their way into a folder, and of the folder when it is read again."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatserve.errors import ModelLoadError
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.manifest import raw
from chatserve.models.merged_check import HashedWeights, verify_hashes
from tests import deltas

NAME = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return deltas.write_folder(tmp_path / "m", deltas.base_tensors(), form="safetensors")


def hashes(folder: Path) -> dict[str, str]:
    """As they are taken while a folder is written: some rows at a time."""
    with closing(open_checkpoint(folder).weights) as weights:
        infos = weights.tensors()
        hashed = HashedWeights(weights, {name: info.dtype for name, info in infos.items()})
        for name, info in infos.items():
            for start in range(0, info.shape[0], 5):
                hashed.read(name, range(start, min(start + 5, info.shape[0])))
        assert hashed.tensors() == infos
    return hashed.hashes()


def check(folder: Path, known: dict[str, str]) -> list[tuple[int, int]]:
    steps: list[tuple[int, int]] = []
    verify_hashes(folder, known, lambda done, total: steps.append((done, total)))
    return steps


def test_the_slices_do_not_matter(folder: Path) -> None:
    known = hashes(folder)
    assert known[NAME] == hashlib.sha256(raw(deltas.base_tensors()[NAME])).hexdigest()
    steps = check(folder, known)
    total = sum(tensor.nbytes for tensor in deltas.base_tensors().values())
    assert steps[-1] == (total, total) and len(steps) == len(known)


def test_what_is_hashed_is_what_will_be_written(folder: Path) -> None:
    """A merged matrix comes in float32 and is rounded once."""
    with closing(open_checkpoint(folder).weights) as weights:
        hashed = HashedWeights(weights, {NAME: torch.bfloat16})
        given = hashed.read(NAME)
    expected = deltas.base_tensors()[NAME].to(torch.bfloat16)
    assert given.dtype == torch.bfloat16 and given.equal(expected)
    assert hashed.hashes() == {NAME: hashlib.sha256(raw(expected)).hexdigest()}


def test_one_bit_is_found_and_named(folder: Path) -> None:
    known = hashes(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[NAME].view(torch.uint8)[3] ^= 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=f"'{NAME}' is not what was merged"):
        check(folder, known)


def test_a_tensor_too_few_or_too_many_is_named(folder: Path) -> None:
    known = hashes(folder)
    with pytest.raises(ModelLoadError, match="'extra' is missing in the files"):
        check(folder, known | {"extra": "0"})
    del known[NAME]
    with pytest.raises(ModelLoadError, match=f"'{NAME}' is missing in what was merged"):
        check(folder, known)
