"""A network over several devices computes what the same network on one does, to the bit."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.errors import DoesNotFit, ModelLoadError
from chatserve.models import offload
from chatserve.models.adapter import load_adapter
from chatserve.models.adapter_places import adapter_places
from chatserve.models.batch import Batch, Segment
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import DevicePolicy, choose_policy, policy_for
from chatserve.models.device_map import CPU, DISK, DeviceMap, Part
from chatserve.models.gpus import torch_policy
from chatserve.models.llama import MLP, Block
from chatserve.models.loader import load_model
from chatserve.models.packing import Packing
from chatserve.models.placed_llama import PlacedLlama
from tests import adapters, tiny
from tests.networks import SCATTERED, Solo

FIRST, SECOND = Part("cpu:0", "cpu:0"), Part("cpu:1", "cpu:1")
IN_MEMORY, ON_DISK = Part(CPU, "cpu:1"), Part(DISK, "cpu:1")
MAPS: Mapping[str, DeviceMap] = {
    "two devices": DeviceMap(FIRST, (FIRST, FIRST, SECOND, SECOND), SECOND),
    "memory": DeviceMap(Part(CPU, CPU), (SECOND, IN_MEMORY, IN_MEMORY, IN_MEMORY), SECOND),
    "disk": DeviceMap(FIRST, (ON_DISK,) * 4, SECOND),
    "all": DeviceMap(FIRST, (FIRST, SECOND, IN_MEMORY, ON_DISK), SECOND),
    "one of four": DeviceMap(FIRST, (FIRST, ON_DISK, FIRST, FIRST), FIRST),
}
POLICIES = {
    "float32": lambda: choose_policy("cpu", "float32"),
    "bfloat16": lambda: choose_policy("cpu", "bfloat16"),
    "int8": lambda: policy_for("cuda", torch.float32, load_8bit=True),
    "int4": lambda: replace(
        policy_for("cuda", torch.float32, load_8bit=True), packing=Packing(4, is_grouped=True)
    ),
}


@pytest.fixture(params=["llama", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny.save_model(
        tmp_path / "tiny", request.param, num_hidden_layers=4,
        tie_word_embeddings=request.param == "qwen3",
    )  # fmt: skip
    return tmp_path / "tiny"


def load(folder: Path, policy: DevicePolicy, device_map: DeviceMap | None = None) -> Any:
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        return load_model(
            checkpoint, policy, device_map=device_map, offload_folder=folder.parent / "offload"
        )


def tied(device_map: DeviceMap) -> DeviceMap:
    return DeviceMap(device_map.embedding, device_map.blocks, device_map.embedding)


@pytest.mark.parametrize("form", POLICIES)
@pytest.mark.parametrize("name", MAPS)
def test_logits_are_those_of_one_device_to_the_bit(name: str, form: str, folder: Path) -> None:
    policy = POLICIES[form]()
    single = load(folder, policy)
    device_map = tied(MAPS[name]) if single.config.is_tied else MAPS[name]
    placed = load(folder, torch_policy(policy), device_map)
    assert isinstance(placed, PlacedLlama)
    prompt = torch.randint(0, single.vocab_size, (70,), generator=torch.Generator().manual_seed(1))
    expected, found = Solo(single, SCATTERED), Solo(placed, SCATTERED)
    for ids in (prompt, prompt[:1], prompt[:33]):  # prefill, decode, a chunk
        assert torch.equal(found.feed(ids), expected.feed(ids))


def test_layers_on_the_disk_take_no_memory_and_leave_no_file(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "tiny", num_hidden_layers=4)
    model = load(tmp_path / "tiny", choose_policy("cpu", "float32"), MAPS["disk"])
    weight = model.blocks[3].attention.qkv.weight
    assert not any((tmp_path / "offload").iterdir())
    maps = Path("/proc/self/maps").read_text("ascii").splitlines()
    addresses = [line.split() for line in maps if "offload-" in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in addresses]
    assert any(start <= weight.data_ptr() < end for start, end in spans)
    assert len(spans) == 4


def test_every_layer_computes_where_the_map_says(tmp_path: Path) -> None:
    """The meta device refuses tensors of another one, as GPUs do."""
    tiny.save_model(tmp_path / "tiny", num_hidden_layers=4)
    meta = Part("meta", "meta")
    on_meta = Part(CPU, "meta")
    device_map = DeviceMap(FIRST, (FIRST, FIRST, meta, on_meta), meta)
    model = load(tmp_path / "tiny", choose_policy("cpu", "float32"), device_map)
    solo = Solo(model, SCATTERED)
    for num_tokens in (70, 1):
        assert solo.feed(range(num_tokens)).device.type == "meta"
    devices = [solo.pool.layer(layer)[0].device.type for layer in range(4)]
    assert devices == ["cpu", "cpu", "meta", "meta"]
    assert model.blocks[3].mlp.down.weight.device.type == "cpu"  # between two steps


@pytest.mark.parametrize("name", ["two devices", "all", "meta"])
def test_rows_with_adapters_change_as_on_one_device(name: str, tmp_path: Path) -> None:
    """Every matrix of every layer, and the head."""
    tiny.save_model(tmp_path / "tiny", num_hidden_layers=4)
    single = load(tmp_path / "tiny", choose_policy("cpu", "float32"))
    shapes = {module: (place.rows, place.columns)
              for module, place in adapter_places(single.config).items()}  # fmt: skip
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    folder = adapters.write(tmp_path / "sql", adapters.random_pairs(shapes), target_modules=targets)
    adapter = load_adapter(folder, single.config)
    there = Part("meta", "meta")
    on_meta = DeviceMap(FIRST, (FIRST, FIRST, there, Part(CPU, "meta")), there)
    device_map = on_meta if name == "meta" else MAPS[name]
    placed = load(tmp_path / "tiny", choose_policy("cpu", "float32"), device_map)

    def logits(model: Any, adapted: bool) -> torch.Tensor:
        built = model.build_adapter(adapter) if adapted else None
        segments = [Segment(0, 5, 0, [0], built), Segment(5, 3, 0, [1])]
        batch = Batch([3, 1, 4, 1, 5, 9, 2, 6], [0, 1, 2, 3, 4, 0, 1, 2], segments, [4, 5, 7])
        found: torch.Tensor = model.forward(batch, model.build_kv_pool(2, 32))
        return found

    expected, found = logits(single, True), logits(placed, True)
    assert found.is_meta if name == "meta" else torch.equal(found, expected)
    assert not torch.allclose(expected[0], logits(single, False)[0], atol=0.1)


def test_the_next_layer_is_copied_while_the_network_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block waits for the copy of the one after it: in turns it would never come."""
    tiny.save_model(tmp_path / "tiny", num_hidden_layers=4)
    copied: dict[int, threading.Event] = {}
    order: list[tuple[str, int]] = []
    real_copy, real_call = offload.StoredBlock.copy, Block.__call__
    model = load(tmp_path / "tiny", choose_policy("cpu", "float32"), MAPS["disk"])
    layers = {id(stored): layer for layer, stored in model._present._blocks.items()}
    copied = {layer: threading.Event() for layer in range(4)}

    def copy(stored: offload.StoredBlock, after: Any) -> list[torch.Tensor]:
        layer = layers[id(stored)]
        tensors = real_copy(stored, after)
        order.append(("copied", layer))
        copied[layer].set()
        return tensors

    def call(block: Block, *arguments: Any) -> torch.Tensor:
        layer = model.blocks.index(block)
        if layer < 3:
            assert copied[layer + 1].wait(20)
        order.append(("computes", layer))
        return real_call(block, *arguments)

    monkeypatch.setattr(offload.StoredBlock, "copy", copy)
    monkeypatch.setattr(Block, "__call__", call)
    Solo(model).feed(range(5))
    assert [step for step in order if step != ("copied", 0)] == [
        ("copied", 1), ("computes", 0), ("copied", 2), ("computes", 1),
        ("copied", 3), ("computes", 2), ("computes", 3),
    ]  # fmt: skip


def test_no_more_than_two_blocks_are_on_the_device_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU computes later than it is told to: the copy waits until it is done with one of two."""
    tiny.save_model(tmp_path / "tiny", num_hidden_layers=4)
    model = load(tmp_path / "tiny", choose_policy("cpu", "float32"), MAPS["disk"])
    layers = {id(stored): layer for layer, stored in model._present._blocks.items()}
    order: list[tuple[str, int]] = []
    real_copy = offload.StoredBlock.copy

    class Moment:
        def __init__(self, layer: int) -> None:
            self._layer = layer

        def synchronize(self) -> None:
            order.append(("done with", self._layer))

    def copy(stored: offload.StoredBlock, after: Any) -> list[torch.Tensor]:
        tensors = real_copy(stored, after)
        order.append(("copied", layers[id(stored)]))
        return tensors

    monkeypatch.setattr(offload.StoredBlock, "copy", copy)
    monkeypatch.setattr(offload.StoredBlock, "computed", lambda stored: Moment(layers[id(stored)]))
    solo = Solo(model)
    solo.feed(range(5))
    solo.feed([1])
    model._present._thread.shutdown()
    assert order == [
        ("copied", 0), ("copied", 1),
        ("done with", 0), ("copied", 2), ("done with", 1), ("copied", 3),
        ("done with", 2), ("copied", 0), ("done with", 3), ("copied", 1),
        ("done with", 0), ("copied", 2), ("done with", 1), ("copied", 3),
        ("done with", 2), ("copied", 0),
    ]  # fmt: skip


def test_a_step_that_fails_leaves_the_layers_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_model(tmp_path / "tiny", num_hidden_layers=4)
    model = load(tmp_path / "tiny", choose_policy("cpu", "float32"), MAPS["all"])
    expected = Solo(model).feed(range(9))
    third = model.blocks[2].mlp
    stored, real = third.down.weight.data_ptr(), MLP.__call__

    def failing(mlp: MLP, *arguments: Any) -> torch.Tensor:
        if mlp is third:
            assert third.down.weight.data_ptr() != stored
            raise MemoryError
        return real(mlp, *arguments)

    monkeypatch.setattr(MLP, "__call__", failing)
    with pytest.raises(MemoryError):
        Solo(model).feed(range(9))
    monkeypatch.undo()
    assert third.down.weight.data_ptr() == stored
    assert torch.equal(Solo(model).feed(range(9)), expected)


def test_4_bits_want_whole_groups_here_too(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "tiny", num_hidden_layers=4, intermediate_size=72)
    policy = replace(
        policy_for("cuda", torch.float32, load_8bit=True), packing=Packing(4, is_grouped=True)
    )
    with pytest.raises(ModelLoadError, match="come in groups of 32"):
        load(tmp_path / "tiny", policy, MAPS["two devices"])


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="layers go to the disk on Linux")
def test_a_full_disk_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_model(tmp_path / "tiny", num_hidden_layers=4)

    def full(handle: int, offset: int, num_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DoesNotFit, match=r"cannot keep a layer of 1 MB in .*No space left"):
        load(tmp_path / "tiny", choose_policy("cpu", "float32"), MAPS["disk"])
    assert not any((tmp_path / "offload").iterdir())
