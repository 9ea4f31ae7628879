"""Damaged bases and deltas: the recorded result or a refusal by name, and nothing left behind."""

from __future__ import annotations

import random
import shutil
import tracemalloc
from pathlib import Path

import pytest

from chatserve.errors import ModelLoadError
from chatserve.models.delta import apply_delta
from chatserve.models.manifest import MANIFEST_NAME, read_manifest
from tests.deltas import VOCAB, base_tensors, delta_tensors, with_rotary, write_folder

NUM_MUTANTS = 50  # of each of the four files
MAX_BYTES = 64 << 20


def mutant(data: bytes, choose: random.Random) -> bytes:
    """Bytes flipped, cut off, taken out, put in or doubled; often near the start or the end."""
    changed = bytearray(data)
    for _ in range(choose.choice([1, 1, 3])):
        near = choose.choice([400, 4000, len(changed)])
        at = choose.randrange(min(near, len(changed)))
        if choose.random() < 0.3:
            at = len(changed) - 1 - at
        kind = choose.choice(["flip", "flip", "set", "cut", "take", "put"])
        if kind == "flip":
            changed[at] ^= 1 << choose.randrange(8)
        elif kind == "set":
            changed[at] = choose.choice([0, 0x7F, 0xFF])
        elif kind == "cut" and at:
            del changed[at:]
        elif kind == "take":
            del changed[at : at + choose.randint(1, 64)]
        else:
            changed[at:at] = choose.randbytes(choose.randint(1, 64))
        if not changed:
            break
    return bytes(changed)


@pytest.mark.parametrize("side", ["base", "delta"])
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_every_mutant_gives_the_recorded_sum_or_is_refused(
    form: str, side: str, tmp_path: Path
) -> None:
    write_folder(tmp_path / "base", with_rotary(base_tensors()), form=form)
    write_folder(
        tmp_path / "delta", with_rotary(delta_tensors(vocab=VOCAB + 1)), form=form,
        vocab_size=VOCAB + 1,
    )  # fmt: skip
    target = tmp_path / "m"
    recorded = apply_delta(tmp_path / "base", tmp_path / "delta", target)
    wanted = (target / "model.safetensors").read_bytes()
    shutil.rmtree(target)
    name = {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}[form]
    file = tmp_path / side / name
    whole = file.read_bytes()
    choose = random.Random(f"{form} {side}")
    refused = 0
    tracemalloc.start()
    for _ in range(NUM_MUTANTS):
        file.write_bytes(mutant(whole, choose))
        try:
            apply_delta(tmp_path / "base", tmp_path / "delta", target, recorded=recorded)
        except ModelLoadError as error:
            assert str(tmp_path) in error.message and "\n" not in error.message
            refused += 1
        else:
            assert (target / "model.safetensors").read_bytes() == wanted
            shutil.rmtree(target)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta"]
    assert refused > NUM_MUTANTS // 2
    assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    tracemalloc.stop()


def test_every_mutant_of_a_manifest_is_the_same_or_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "base", base_tensors())
    write_folder(tmp_path / "delta", delta_tensors())
    recorded = apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "m")
    file = tmp_path / "m" / MANIFEST_NAME
    whole = file.read_bytes()
    choose = random.Random(0)
    outcomes = set()
    for _ in range(200):
        file.write_bytes(mutant(whole, choose))
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
