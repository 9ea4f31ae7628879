"""What goes where: each part once, never over a limit, evenly; judged by accelerate's own map."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from chatserve.models.device_map import DISK, GPU, DeviceMap, Part, PartBytes, map_devices

PARTS = PartBytes(embedding=30, block=10, head=30)


def gpus(*sizes: int, limit: int | None = None) -> list[GPU]:
    return [GPU(f"cuda:{index}", size, limit or size) for index, size in enumerate(sizes)]


def homes(device_map: DeviceMap | None) -> dict[str, int]:
    assert device_map is not None
    return dict(Counter(part.home for part in device_map.blocks))


def test_a_network_is_spread_evenly_in_the_order_of_its_blocks() -> None:
    found = map_devices(PARTS, 8, 0, gpus(500, 500), is_tied=False)
    assert found is not None
    assert [part.home for part in found.blocks] == ["cuda:0"] * 4 + ["cuda:1"] * 4
    assert (found.embedding, found.head) == (Part("cuda:0", "cuda:0"), Part("cuda:1", "cuda:1"))
    assert found.bytes_by_home(PARTS, is_tied=False) == {"cuda:0": 70, "cuda:1": 70}
    assert found.describe() == "cuda:0 layers 0-3, cuda:1 layers 4-7"
    assert not found.is_single


def test_a_tied_head_stays_with_the_embedding() -> None:
    found = map_devices(PartBytes(0, 10, 30), 8, 0, gpus(500, 500), is_tied=True)
    assert found is not None
    assert found.head == found.embedding == Part("cuda:0", "cuda:0")
    assert homes(found) == {"cuda:0": 3, "cuda:1": 5}


def test_one_gpu_with_room_for_all_is_no_map_at_all() -> None:
    found = map_devices(PARTS, 8, 1, gpus(148), is_tied=False)
    assert found is not None and found.is_single
    assert map_devices(PARTS, 8, 1, gpus(147), is_tied=False) is None


def test_keys_and_values_take_room_but_not_of_the_limit_for_weights() -> None:
    assert map_devices(PARTS, 8, 5, gpus(500, limit=140), is_tied=False) is not None
    assert map_devices(PARTS, 8, 5, gpus(500, limit=139), is_tied=False) is None
    assert map_devices(PARTS, 8, 5, gpus(179), is_tied=False) is None


def test_what_no_gpu_holds_is_offloaded_first_to_memory_then_to_the_disk() -> None:
    """Of 100 bytes the head takes 30, and two blocks on their way 20: five blocks are left."""
    found = map_devices(PARTS, 8, 0, gpus(100), is_tied=False, host_bytes=30 + 20, disk_bytes=1000)
    assert homes(found) == {"cuda:0": 5, "cpu": 2, DISK: 1}
    assert found is not None and found.embedding == Part("cpu", "cpu")
    assert {part.device for part in found.blocks} == {"cuda:0"}
    assert found.blocks_by_device == {"cuda:0": 8}
    assert found.describe() == "cuda:0 layers 0-4, cpu layers 5-6, disk layers 7-7"


@pytest.mark.parametrize(("host", "disk"), [(0, 1000), (29, 1000), (50, 9), (0, 0)])
def test_offloading_needs_the_room_that_it_takes(host: int, disk: int) -> None:
    found = map_devices(PARTS, 8, 0, gpus(100), is_tied=False, host_bytes=host, disk_bytes=disk)
    assert found is None


@given(
    st.integers(1, 12), st.integers(0, 8), st.booleans(),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=3),
    st.integers(0, 150), st.integers(0, 60),
)  # fmt: skip
def test_no_device_holds_more_than_it_may(
    num_layers: int, kv: int, is_tied: bool, sizes: list[tuple[int, int]], host: int, disk: int
) -> None:
    parts = PartBytes(0 if is_tied else 30, 10, 30)
    places = [GPU(f"cuda:{i}", room, min(room, limit)) for i, (room, limit) in enumerate(sizes)]
    found = map_devices(
        parts, num_layers, kv, places, is_tied=is_tied, host_bytes=host, disk_bytes=disk
    )
    if found is None:
        return
    held = found.bytes_by_home(parts, is_tied=is_tied)
    assert sum(held.values()) == parts.embedding + parts.head + 10 * num_layers
    assert held.get("cpu", 0) <= host and held.get(DISK, 0) <= disk
    for gpu in places:
        carried = sum(part.is_offloaded and part.device == gpu.name for part in found.blocks)
        weights = held.get(gpu.name, 0) + 10 * min(carried, 2)
        assert weights <= gpu.limit_bytes or weights == 0
        assert weights + kv * found.blocks_by_device.get(gpu.name, 0) <= gpu.room_bytes


class Skeleton(nn.Module):
    """Parts of a network as accelerate sees them: bytes on the meta device."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.embedding = self._part(PARTS.embedding)
        self.blocks = nn.ModuleList(self._part(PARTS.block) for _ in range(num_layers))
        self.head = self._part(PARTS.head)

    def _part(self, num_bytes: int) -> nn.Module:
        return nn.Linear(num_bytes, 1, bias=False, device="meta", dtype=torch.float8_e4m3fn)


@pytest.mark.filterwarnings("ignore")  # that there are no such GPUs here
@pytest.mark.parametrize(("num_layers", "sizes"), [(8, (90, 50)), (9, (60, 60, 30)), (4, (40, 60))])
def test_accelerate_would_put_the_same_number_of_blocks_on_the_gpus(
    num_layers: int, sizes: tuple[int, ...]
) -> None:
    """Where room leaves no choice, as it fills one after the other.

    It keeps the first free for its largest layer, which takes 30 here.
    """
    from accelerate import infer_auto_device_map

    limits = {index: size + 30 * (index == 0) for index, size in enumerate(sizes)}
    theirs = infer_auto_device_map(Skeleton(num_layers), max_memory={**limits, "cpu": 0})
    expected = Counter(
        f"cuda:{device}" if isinstance(device, int) else device
        for layer in range(num_layers)
        for name, device in theirs.items()
        if f"blocks.{layer}." in f"{name}." or name == "blocks"
    )
    found = map_devices(PARTS, num_layers, 0, gpus(*sizes), is_tied=False)
    assert homes(found) == dict(expected) and DISK not in expected
