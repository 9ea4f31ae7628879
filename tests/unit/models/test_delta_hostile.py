"""Damaged bases and deltas: the recorded result or a refusal by name, and nothing left behind."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from chatserve.errors import ModelLoadError
from chatserve.models.delta import apply_delta
from chatserve.models.manifest import MANIFEST_NAME, read_manifest
from tests.deltas import base_tensors, delta_tensors, write_folder
from tests.mutants import mutated


def test_every_mutant_of_a_manifest_is_the_same_or_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "base", base_tensors())
    write_folder(tmp_path / "delta", delta_tensors())
    recorded = apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "m")
    file = tmp_path / "m" / MANIFEST_NAME
    whole = file.read_bytes()
    choose = random.Random(0)
    outcomes = set()
    for _ in range(200):
        file.write_bytes(mutated(whole, choose))
        try:
            manifest = read_manifest(file)
            apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "n", recorded=manifest)
        except ModelLoadError as error:
            assert str(tmp_path) in error.message
            outcomes.add("refused")
        else:
            assert manifest.tensors == recorded.tensors
            shutil.rmtree(tmp_path / "n")
            outcomes.add("same")
        assert not (tmp_path / "n").exists()
    assert outcomes == {"refused", "same"}
